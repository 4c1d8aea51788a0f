package main

import (
	"encoding/json"
	"errors"
	"fmt"

	"wayout/router"
	"wayout/router/config"
)

// plan prints, as ip commands, what apply would do.
func plan(e *env, args []string) error {
	return network(e, "plan", args, router.PlanNetwork)
}

// apply makes addresses, rules and routes as the configuration wants them.
func apply(e *env, args []string) error {
	return network(e, "apply", args, router.ApplyNetwork)
}

// clean removes all that is ours from the kernel.
func clean(e *env, args []string) error {
	return network(e, "clean", args, router.CleanNetwork)
}

// network runs one of the three and prints the changes that it made, or would
// make, and what cannot be had.
func network(e *env, name string, args []string, do func(*config.Config) (router.Changes, error)) error {
	f := newFlags(e, name).withConfig().withJSON()
	if _, err := f.parse(args, 0); err != nil {
		return err
	}
	c, err := f.loadConfig()
	if err != nil {
		return err
	}
	if c == nil {
		c = config.Default(nil)
	}
	changes, err := do(c)
	if *f.json {
		if changes.Commands == nil {
			changes.Commands = []string{}
		}
		return errors.Join(err, json.NewEncoder(e.stdout).Encode(changes))
	}
	for _, line := range changes.Commands {
		fmt.Fprintln(e.stdout, line)
	}
	for _, n := range changes.Notes {
		fmt.Fprintf(e.stderr, "wayout: %s\n", n)
	}
	return err
}
