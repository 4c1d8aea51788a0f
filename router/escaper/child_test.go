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

// inChild runs the rest of a test in a process of its own, which is this one
// started again for that test alone.
func inChild(t *testing.T, f func(*testing.T)) {
	t.Helper()
	if os.Getenv(childEnv) == t.Name() {
		f(t)
		return
	}
	var out bytes.Buffer
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), childEnv+"="+t.Name())
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Run(); err != nil {
		t.Errorf("child: %v\n%s", err, &out)
	}
}

// inNamespace is inChild with the child in a network namespace.
func inNamespace(t *testing.T, ns *lab.NS, f func(*testing.T)) {
	t.Helper()
	if os.Getenv(childEnv) == t.Name() {
		f(t)
		return
	}
	var out bytes.Buffer
	cmd, err := ns.Start(lab.Program{
		Path: os.Args[0], Args: []string{"-test.run=^" + t.Name() + "$", "-test.v"},
		Env: append(os.Environ(), childEnv+"="+t.Name()), Stdout: &out, Stderr: &out,
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("child: %v\n%s", err, &out)
	}
}
