package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"html"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// flameAll draws where each proxy spends its CPU in each mode.
func (b *bench) flameAll(ctx context.Context) error {
	if err := os.MkdirAll(b.o.flame, 0o755); err != nil {
		return err
	}
	for _, m := range b.modes {
		for _, p := range b.proxies {
			via := p.via(&m)
			if via == "" || via == viaDirect || m.fresh {
				continue
			}
			if ctx.Err() != nil {
				return nil
			}
			data := filepath.Join(b.dir, "perf.data")
			_, err := b.measure(ctx, p, m, via, func(g *group) (func() error, error) {
				args, err := g.pidArgs("-p")
				if err != nil {
					return nil, err
				}
				return attached(filepath.Join(b.dir, "perf"), "perf", append([]string{"record", "-q", "-g", "-F", "999", "-o", data}, args...)...)
			})
			if err != nil {
				return err
			}
			root, err := readProfile(data)
			if err != nil {
				return fmt.Errorf("profile of %s in %s: %w", p.name, m.name, err)
			}
			name := filepath.Join(b.o.flame, fmt.Sprintf("flame-%s-%s.svg", p.name, m.name))
			var svg bytes.Buffer
			root.draw(&svg, fmt.Sprintf("%s, %s: %s", p.name, m.name, m.what))
			if err := os.WriteFile(name, svg.Bytes(), 0o644); err != nil {
				return err
			}
			fmt.Fprintln(b.o.log, "wrote", name)
		}
	}
	return nil
}

// A frame is a function with what it calls, and the samples in both.
type frame struct {
	name   string
	kernel bool
	count  int
	calls  map[string]*frame
}

// readProfile asks perf for the stacks in a file, and folds them.
func readProfile(data string) (*frame, error) {
	cmd := exec.Command("perf", "script", "-i", data, "-F", "comm,ip,sym")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, &stderr)
	}
	return fold(bytes.NewReader(out))
}

// fold reads the output of perf script: for each sample a line that begins at
// the margin, then a line for each frame, the innermost first, then an empty
// line.
func fold(r io.Reader) (*frame, error) {
	root := &frame{name: "all"}
	var stack []frame
	in := bufio.NewScanner(r)
	for in.Scan() {
		line := in.Text()
		if line != "" && !strings.HasPrefix(line, " ") && !strings.HasPrefix(line, "\t") {
			continue
		}
		if line = strings.TrimSpace(line); line == "" {
			root.add(stack)
			stack = stack[:0]
			continue
		}
		addr, name, _ := strings.Cut(line, " ")
		name, _, _ = strings.Cut(name, "+0x")
		if name == "" {
			name = "[unknown]"
		}
		// The upper half of the address space is the kernel's.
		stack = append(stack, frame{name: name, kernel: len(addr) == 16 && addr[0] == 'f'})
	}
	root.add(stack)
	if root.count == 0 {
		return nil, errors.Join(errors.New("no samples"), in.Err())
	}
	return root, in.Err()
}

// add counts a stack, the innermost frame first.
func (f *frame) add(stack []frame) {
	if len(stack) == 0 {
		return
	}
	f.count++
	for _, s := range slices.Backward(stack) {
		next := f.calls[s.name]
		if next == nil {
			if f.calls == nil {
				f.calls = map[string]*frame{}
			}
			next = &frame{name: s.name, kernel: s.kernel}
			f.calls[s.name] = next
		}
		next.count++
		f = next
	}
}

// The picture, in pixels.
const (
	flameWidth = 1200
	flameRow   = 15
	flameTop   = 34
	flameLeast = 2.5 // narrower frames are left out
	letter     = 6.2 // of the text in a frame
)

func (f *frame) depth(width float64) int {
	deepest := 0
	for _, c := range f.calls {
		if w := width * float64(c.count) / float64(f.count); w >= flameLeast {
			deepest = max(deepest, c.depth(w))
		}
	}
	return 1 + deepest
}

// draw writes the frame as an SVG: what calls below, what is called above it.
func (f *frame) draw(w *bytes.Buffer, title string) {
	height := flameTop + flameRow*f.depth(flameWidth) + 4
	fmt.Fprintf(w, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="monospace" font-size="10">
<style>rect{stroke:#fff;stroke-width:.4}g:hover rect{stroke:#000}</style>
<rect width="100%%" height="100%%" fill="#fff"/>
<text x="4" y="14" font-size="13">%s</text>
<text x="4" y="28">%d samples of the CPU; a frame is as wide as its share; kernel in orange, user space in green</text>
`, flameWidth, height, flameWidth, height, html.EscapeString(title), f.count)
	f.box(w, 0, flameWidth, height-4-flameRow, f.count)
	w.WriteString("</svg>\n")
}

func (f *frame) box(w *bytes.Buffer, x, width float64, y, all int) {
	name := html.EscapeString(f.name)
	fmt.Fprintf(w, `<g><title>%s: %.1f%%</title><rect x="%.1f" y="%d" width="%.1f" height="%d" fill="%s"/>`,
		name, 100*float64(f.count)/float64(all), x, y, width, flameRow-1, f.color())
	if fits := int((width - 4) / letter); fits >= 3 {
		short := f.name
		if len(short) > fits {
			short = short[:fits-1] + "…"
		}
		fmt.Fprintf(w, `<text x="%.1f" y="%d">%s</text>`, x+2, y+flameRow-5, html.EscapeString(short))
	}
	w.WriteString("</g>\n")
	calls := slices.SortedFunc(maps.Values(f.calls), func(a, b *frame) int { return cmp.Compare(a.name, b.name) })
	for _, c := range calls {
		cw := width * float64(c.count) / float64(f.count)
		if cw >= flameLeast {
			c.box(w, x, cw, y-flameRow, all)
		}
		x += cw
	}
}

// color is the same for a function wherever it stands.
func (f *frame) color() string {
	h := fnv.New32a()
	_, _ = h.Write([]byte(f.name)) // never fails
	shade := h.Sum32() % 24
	hue := 95
	if f.kernel {
		hue = 30
	}
	return fmt.Sprintf("hsl(%d,65%%,%d%%)", hue, 58+shade)
}
