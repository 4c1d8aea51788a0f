package main

import (
	"encoding/json"
	"errors"
	"fmt"

	"wayout/router"
	"wayout/router/config"
)

// check reads a configuration and says what is wrong with it; with --live
// also what the host lacks for it.
func check(e *env, args []string) error {
	f := newFlags(e, "check").withConfig().withJSON()
	live := f.Bool("live", false, "also against the host: addresses there, interfaces up, rights enough")
	reference := f.Bool("reference", false, "print the reference of all keys instead")
	if _, err := f.parse(args, 0); err != nil {
		return err
	}
	if *reference {
		return config.Reference(e.stdout)
	}
	c, _, err := f.hostConfig()
	var found []string
	mistakes := config.Errors(nil)
	switch {
	case errors.As(err, &mistakes) && *f.json:
		for _, m := range mistakes {
			found = append(found, m.Error())
		}
		return errors.Join(printFound(e, found), &exitError{code: exitUsage})
	case err != nil:
		return err
	}
	if err := router.CheckConfig(c); err != nil {
		return &exitError{code: exitUsage, err: err}
	}
	if *live {
		if found, err = router.CheckHost(c); err != nil {
			return err
		}
	}
	if *f.json {
		err = printFound(e, found)
	} else {
		for _, line := range found {
			fmt.Fprintln(e.stdout, line)
		}
	}
	if len(found) > 0 {
		return errors.Join(err, &exitError{code: exitFailed})
	}
	if !*f.json {
		fmt.Fprintln(e.stdout, "ok")
	}
	return err
}

func printFound(e *env, found []string) error {
	if found == nil {
		found = []string{}
	}
	return json.NewEncoder(e.stdout).Encode(struct {
		OK     bool     `json:"ok"`
		Errors []string `json:"errors"`
	}{len(found) == 0, found})
}
