package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"wayout/router"
	"wayout/router/auth"
	"wayout/router/config"
	"wayout/router/control"
)

// defaultConfig is read when no --config is given and it exists.
const defaultConfig = "/etc/wayout/wayout.yaml"

// defaultSocket is the control socket of a daemon without configuration.
const defaultSocket = "/run/wayout/control.sock"

// loadConfig reads the configuration that --config names, else the default
// one. It is nil, without an error, when there is neither: then the program
// goes by what it finds on the host.
func (f *flags) loadConfig() (*config.Config, error) {
	path := *f.config
	if path == "" {
		path = defaultConfig
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			return nil, nil //nolint:nilnil // documented: neither a configuration nor a mistake
		}
	}
	c, err := config.Loader{Hash: auth.ValidateHash}.Load(path)
	if err != nil {
		return nil, &exitError{code: exitUsage, err: err}
	}
	return c, nil
}

// hostConfig is loadConfig with what the host shows in the place of a missing
// configuration; found says that it came to that.
func (f *flags) hostConfig() (c *config.Config, found bool, err error) {
	c, err = f.loadConfig()
	if err == nil && c == nil {
		c, err = router.FindConfig()
		found = err == nil
	}
	return c, found, err
}

// privileged refuses to begin what needs rights that this process lacks.
func (f *flags) privileged() error {
	ok, err := router.Privileged()
	if err == nil && !ok {
		err = fmt.Errorf("%s needs root, or CAP_NET_ADMIN and CAP_BPF; wayout doctor tells what is missing", f.Name())
	}
	return err
}

// built gives an error of building a configuration its exit code.
func built(err error) error {
	if m := (*router.Mistake)(nil); errors.As(err, &m) {
		return &exitError{code: exitUsage, err: err}
	}
	return err
}

// client makes a client of the control socket: --control, else that of the
// configuration, else the default one.
func (f *flags) client() (*control.Client, error) {
	if *f.control != "" {
		return control.NewClient(*f.control), nil
	}
	c, err := f.loadConfig()
	if err != nil {
		return nil, err
	}
	if c == nil {
		return control.NewClient(defaultSocket), nil
	}
	return control.NewClient(c.Control.Socket), nil
}

// exitError is an error with an exit code of its own.
type exitError struct {
	code int
	err  error // nil: all has been said already
}

func (e *exitError) Error() string { return fmt.Sprint(e.err) }

func (e *exitError) Unwrap() error { return e.err }

// usageError is a mistake in the command line.
func usageError(format string, args ...any) error {
	return &exitError{code: exitUsage, err: fmt.Errorf(format, args...)}
}
