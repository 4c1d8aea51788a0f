package bpf

//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -go-package bpf -type guard -type counters kernel kernel.c -- -mcpu=v3 -Wall -Wextra -Werror -nostdinc -I.

//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -go-package bpf -type prefix responder responder.c -- -mcpu=v3 -Wall -Wextra -Werror -nostdinc -I.

//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -go-package bpf -type net -type drops divert divert.c -- -mcpu=v3 -Wall -Wextra -Werror -nostdinc -I.

//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -go-package bpf pin pin.c -- -mcpu=v3 -Wall -Wextra -Werror -nostdinc -I.
