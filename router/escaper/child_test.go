package escaper_test

import (
	"bytes"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"wayout/scripts/lab"
)

const childEnv = "WAYOUT_ESCAPER_CHILD"

// isChild reports whether this process was started to run this test alone.
func isChild(t *testing.T) bool { return os.Getenv(childEnv) == t.Name() }

func childArgs(t *testing.T) (args, env []string) {
	return []string{"-test.run=^" + t.Name() + "$", "-test.v"}, append(os.Environ(), childEnv+"="+t.Name())
}

// runChild runs the test again in a process of its own.
func runChild(t *testing.T) {
	t.Helper()
	var out bytes.Buffer
	args, env := childArgs(t)
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = env, &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Run(); err != nil {
		t.Errorf("child: %v\n%s", err, &out)
	}
}

// runChildIn is runChild in a network namespace.
func runChildIn(t *testing.T, ns *lab.NS) {
	t.Helper()
	var out bytes.Buffer
	args, env := childArgs(t)
	cmd, err := ns.Start(lab.Program{Path: os.Args[0], Args: args, Env: env, Stdout: &out, Stderr: &out})
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("child: %v\n%s", err, &out)
	}
}
