// Package say is how the program in the virtual machine talks to the one
// outside: by lines on a console that the kernel writes to as well.
package say

// Mark begins each line.
const Mark = "wayout-vm: "

// Verdicts, each a line of its own and the last.
const (
	Good = "verdict: as documented"
	Bad  = "verdict: not as documented"
)
