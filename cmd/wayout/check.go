package main

import (
	"encoding/json"
	"errors"
	"fmt"

	"wayout/router"
	"wayout/router/config"
)

// fault is one thing that check found, for programs. What is not about a place
// in the file is a message alone.
type fault struct {
	File    string `json:"file,omitempty"`
	Line    int    `json:"line,omitempty"`
	Key     string `json:"key,omitempty"`
	Message string `json:"message"`
}

// check reads a configuration and says what is wrong with it; with --live
// also what the host lacks for it.
func check(e *env, args []string) error {
	f := newFlags(e, "check").withConfig().withJSON()
	live := f.Bool("live", false, "also against the host: addresses there, interfaces up, rights enough")
	reference := f.Bool("reference", false, "print the reference of all keys instead")
	if _, err := f.parse(args); err != nil {
		return err
	}
	if *reference {
		if *f.json {
			return json.NewEncoder(e.stdout).Encode(map[string]any{"keys": config.Keys()})
		}
		return config.Reference(e.stdout)
	}
	c, none, err := f.hostConfig()
	if err == nil {
		err = built(router.CheckConfig(c))
	}
	if err != nil {
		if *f.json && exitCode(err) == exitUsage {
			return errors.Join(printFaults(e, faults(err)), &exitError{code: exitUsage})
		}
		return err
	}
	if none && !*f.json {
		fmt.Fprintf(e.stdout, "there is no configuration file %s: wayout serve goes by what it finds on the host\n\n", defaultConfig)
		printFoundConfig(e.stdout, c)
		fmt.Fprintln(e.stdout)
	}
	if len(c.Servers) == 0 {
		fmt.Fprintln(e.stderr, "note: no server: nothing will be listened on")
	}
	var lacks []string
	if *live {
		if lacks, err = router.CheckHost(c); err != nil {
			return err
		}
	}
	var found []fault
	for _, line := range lacks {
		found = append(found, fault{Message: line})
	}
	switch {
	case *f.json:
		err = printFaults(e, found)
	case len(found) == 0:
		fmt.Fprintln(e.stdout, "ok")
	default:
		for _, x := range found {
			fmt.Fprintln(e.stdout, x.Message)
		}
	}
	if len(found) > 0 {
		return errors.Join(err, &exitError{code: exitFailed})
	}
	return err
}

// faults takes an error of a configuration apart.
func faults(err error) []fault {
	mistakes := config.Errors(nil)
	if !errors.As(err, &mistakes) {
		return []fault{{Message: err.Error()}}
	}
	var all []fault
	for _, m := range mistakes {
		all = append(all, fault{m.File, m.Line, m.Key, m.Msg})
	}
	return all
}

func printFaults(e *env, found []fault) error {
	if found == nil {
		found = []fault{}
	}
	return json.NewEncoder(e.stdout).Encode(struct {
		OK     bool    `json:"ok"`
		Errors []fault `json:"errors"`
	}{len(found) == 0, found})
}
