// Command wayout routes each request out by the address, device and uplink it
// asks for. `wayout help` lists its commands.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	"wayout/router/config"
)

// version is set by the linker.
var version = "dev" //nolint:gochecknoglobals // -ldflags -X needs a package variable

// Exit codes of every command; exec has others.
const (
	exitOK     = 0
	exitFailed = 1 // failed or refused
	exitUsage  = 2 // usage or configuration
)

// env is what a command may touch besides the system it is about.
type env struct {
	stdin  *os.File
	stdout io.Writer
	stderr io.Writer
	getenv func(string) string
}

// verb is one command.
type verb struct {
	name  string
	args  string
	short string
	run   func(e *env, args []string) error
}

func verbs() []verb {
	return []verb{
		{"serve", "[--config F]", "run the daemon in the foreground", serve},
		{"check", "[--config F] [--live] [--reference]", "say what is wrong with a configuration", check},
		{"explain", "[--server S] [--user U] [--header V] [--username N] TARGET", "which path a request would take and why, sending nothing", explain},
		{"paths", "[--watch]", "the state of each path", paths},
		{"top", "[--once]", "the same, live, in the terminal", top},
		{"drain", "PATH", "no new connections on a path; the open ones live on", drain},
		{"undrain", "PATH", "give a drained path back", undrain},
		{"publish", "ESCAPER FILE|-", "replace the nodes of a direct_float or proxy_float by those of a JSON array", publish},
		{"exec", "--path PATH [--dns] -- COMMAND...", "run a command whose every connection leaves by the path", runExec},
		{"pin", "[CGROUP PATH [--kill]]", "hold the processes of a cgroup to a path, or list the pins", pin},
		{"unpin", "CGROUP", "let them go", unpin},
		{"reload", "", "have the daemon read its configuration again, as SIGHUP does", reload},
		{"plan", "[--config F]", "what apply would change, as ip commands", plan},
		{"apply", "[--config F]", "make addresses, rules and routes as the configuration wants them", apply},
		{"clean", "[--config F]", "remove all that is ours from the kernel", clean},
		{"doctor", "[--config F] [--fix]", "what this host allows and lacks, and the remedies", doctor},
		{"hash-password", "", "read a password from standard input, print its hash", hashPassword},
		{"version", "", "print the version", printVersion},
	}
}

func main() {
	os.Exit(run(&env{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, getenv: os.Getenv}, os.Args[1:]))
}

func run(e *env, args []string) int {
	if len(args) == 0 {
		usage(e.stderr)
		return exitUsage
	}
	if args[0] == "--version" || args[0] == "-version" {
		args = append([]string{"version"}, args[1:]...)
	}
	if args[0] == "help" || args[0] == "-h" || args[0] == "--help" {
		usage(e.stdout)
		return exitOK
	}
	if args[0] == resolverVerb {
		return report(e, serveNames(e, args[1:]))
	}
	for _, v := range verbs() {
		if v.name == args[0] {
			return report(e, v.run(e, args[1:]))
		}
	}
	fmt.Fprintf(e.stderr, "wayout: unknown command %q; `wayout help` lists them\n", args[0])
	return exitUsage
}

// report prints an error and turns it into the exit code.
func report(e *env, err error) int {
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return exitOK
	}
	code := exitCode(err)
	if x := (*exitError)(nil); errors.As(err, &x) && x.err == nil {
		return code
	}
	// The lines of a configuration's mistakes begin with the file's name, as
	// editors want them.
	if mistakes := config.Errors(nil); !errors.As(err, &mistakes) {
		fmt.Fprint(e.stderr, "wayout: ")
	}
	fmt.Fprintln(e.stderr, err)
	return code
}

// exitCode is that of an error: its own, or that of a failure.
func exitCode(err error) int {
	if x := (*exitError)(nil); errors.As(err, &x) {
		return x.code
	}
	return exitFailed
}

func usage(w io.Writer) {
	fmt.Fprint(w, "wayout sends each request out by the address it asks for.\n\nusage: wayout COMMAND [FLAG...]\n\n")
	for _, v := range verbs() {
		fmt.Fprintf(w, "  %-44s %s\n", strings.TrimSpace(v.name+" "+v.args), v.short)
	}
	fmt.Fprint(w, "\nMost take --json, --config FILE and --control SOCKET; `wayout COMMAND --help` tells.\n"+
		"Exit codes: 0 done, 1 failed or refused, 2 usage or configuration; exec: the command's own, 125 to 127, 128 and a signal.\n")
}

// flags is a command's flag set with the flags that most commands share.
type flags struct {
	*flag.FlagSet
	config, control *string
	json            *bool
	form            string // of the command that has arguments: what goes before them
}

func newFlags(e *env, name string) *flags {
	f := flag.NewFlagSet("wayout "+name, flag.ContinueOnError)
	f.SetOutput(e.stderr)
	return &flags{FlagSet: f}
}

func (f *flags) withConfig() *flags {
	f.config = f.String("config", "", "configuration `file` (default "+defaultConfig+" when it exists)")
	return f
}

func (f *flags) withControl() *flags {
	f.control = f.String("control", "", "control `socket` (default: that of the configuration)")
	return f.withConfig()
}

func (f *flags) withJSON() *flags {
	f.json = f.Bool("json", false, "machine output")
	return f
}

// parse reads the flags wherever they stand and gives the other arguments,
// of which there must be one for each of names.
func (f *flags) parse(args []string, names ...string) ([]string, error) {
	var rest []string
	for {
		if err := f.Parse(args); err != nil {
			return nil, parseError(err)
		}
		args = f.Args()
		if len(args) == 0 {
			break
		}
		rest, args = append(rest, args[0]), args[1:]
	}
	switch {
	case len(rest) == len(names):
		return rest, nil
	case len(names) > 0:
		return nil, usageError("usage: %s%s %s", f.Name(), f.form, strings.Join(names, " "))
	case f.config != nil:
		return nil, usageError("%s takes no arguments, got %q; a configuration is given by --config FILE", f.Name(), rest[0])
	}
	return nil, usageError("%s takes no arguments, got %q", f.Name(), rest[0])
}

// parseError is the error of a command line that package flag has refused.
func parseError(err error) error {
	if errors.Is(err, flag.ErrHelp) {
		return err
	}
	return &exitError{code: exitUsage} // it has been said already
}
