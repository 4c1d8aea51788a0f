package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"wayout/router/control"
)

// publish replaces the nodes of an escaper.
func publish(e *env, args []string) error {
	f := newFlags(e, "publish").withControl().withJSON()
	rest, err := f.parse(args, "ESCAPER", "FILE|-")
	if err != nil {
		return err
	}
	text, err := readPublication(e, rest[1])
	if err != nil {
		return err
	}
	c, err := f.client()
	if err != nil {
		return err
	}
	done, err := c.Publish(context.Background(), rest[0], text)
	if err != nil {
		return err
	}
	if *f.json {
		return json.NewEncoder(e.stdout).Encode(done)
	}
	fmt.Fprintf(e.stdout, "%s: %d nodes\n", done.Escaper, done.Nodes)
	return nil
}

func readPublication(e *env, file string) ([]byte, error) {
	in := io.Reader(e.stdin)
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	text, err := io.ReadAll(io.LimitReader(in, control.MaxPublication+1))
	if err != nil {
		return nil, err
	}
	if len(text) > control.MaxPublication {
		return nil, fmt.Errorf("a publication has at most %d bytes", control.MaxPublication)
	}
	return text, nil
}
