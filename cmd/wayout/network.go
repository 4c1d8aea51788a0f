package main

import (
	"encoding/json"
	"fmt"

	"wayout/router"
	"wayout/router/config"
)

// plan prints, as ip commands, what apply would do.
func plan(e *env, args []string) error {
	f := newFlags(e, "plan").withConfig().withJSON()
	return network(e, f, args, router.PlanNetwork)
}

// apply makes addresses, rules and routes as the configuration wants them.
func apply(e *env, args []string) error {
	f := newFlags(e, "apply").withConfig().withJSON()
	return network(e, f, args, f.withRights(router.ApplyNetwork))
}

// clean removes all that is ours from the kernel.
func clean(e *env, args []string) error {
	f := newFlags(e, "clean").withConfig().withJSON()
	return network(e, f, args, f.withRights(router.CleanNetwork))
}

// withRights is do for a process that may do it.
func (f *flags) withRights(do func(*config.Config) (router.Changes, error)) func(*config.Config) (router.Changes, error) {
	return func(c *config.Config) (router.Changes, error) {
		if err := f.privileged(); err != nil {
			return router.Changes{}, err
		}
		return do(c)
	}
}

// network runs one of the three and prints the changes that it made, or would
// make, and what cannot be had. After a failure it prints no changes: how many
// of them were made is not known.
func network(e *env, f *flags, args []string, do func(*config.Config) (router.Changes, error)) error {
	if _, err := f.parse(args); err != nil {
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
	if *f.json && err == nil {
		if changes.Commands == nil {
			changes.Commands = []string{}
		}
		return json.NewEncoder(e.stdout).Encode(changes)
	}
	for _, n := range changes.Notes {
		fmt.Fprintf(e.stderr, "wayout: %s\n", n)
	}
	if err != nil {
		return built(err)
	}
	for _, line := range changes.Commands {
		fmt.Fprintln(e.stdout, line)
	}
	if len(changes.Commands) == 0 {
		// Not on the output, which is for a shell.
		fmt.Fprintln(e.stderr, "wayout: nothing to change in addresses, rules and routes")
	}
	return nil
}
