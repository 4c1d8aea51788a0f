package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// maxFile bounds a configuration file, in bytes: some 400,000 nodes.
const maxFile = 32 << 20

// document parses one YAML document and returns its root, or nil after it has said what is wrong.
func (d *decoder) document(data []byte) *yaml.Node {
	if len(data) > maxFile {
		d.failFile(1, fmt.Sprintf("the file is over %d MiB", maxFile>>20))
		return nil
	}
	if line, what := badText(data); what != "" {
		d.failFile(line, what)
		return nil
	}
	docs, err := parseYAML(bytes.NewReader(data), 2)
	if err != nil {
		line, msg := syntaxError(data, err)
		d.failFile(line, "not YAML: "+msg)
		return nil
	}
	if len(docs) == 0 || len(docs[0].Content) == 0 || docs[0].Content[0].ShortTag() == "!!null" {
		d.failFile(1, "the file is empty")
		return nil
	}
	if len(docs) > 1 {
		d.failFile(max(1, docs[1].Line), "a second YAML document begins here, and a file holds one")
		return nil
	}
	return docs[0].Content[0]
}

// parseYAML returns the first documents of a stream, at most limit of them.
func parseYAML(r io.Reader, limit int) (docs []*yaml.Node, err error) {
	defer func() {
		// The library answers some streams that its own parser should not make with a panic of its own.
		if p := recover(); p != nil {
			docs, err = nil, fmt.Errorf("yaml: %v", p)
		}
	}()
	dec := yaml.NewDecoder(r)
	for len(docs) < limit {
		n := new(yaml.Node)
		if err := dec.Decode(n); err != nil {
			if errors.Is(err, io.EOF) {
				return docs, nil
			}
			return nil, err
		}
		docs = append(docs, n)
	}
	return docs, nil
}

// badText finds what YAML does not allow in a text at all (YAML 1.2 section 5.1).
func badText(data []byte) (line int, what string) {
	line = 1
	for i := 0; i < len(data); {
		if c := data[i]; c >= ' ' && c < 0x7f || c == '\t' || c == '\r' {
			i++
			continue
		}
		r, n := utf8.DecodeRune(data[i:])
		switch {
		case r == '\n':
			line++
		case r == utf8.RuneError && n == 1:
			return line, fmt.Sprintf("not YAML: the text is not UTF-8, got \"\\x%02x\"", data[i])
		case r < ' ', r >= 0x7f && r < 0xa0 && r != 0x85, r == 0xfeff && i > 0, r == 0xfffe, r == 0xffff:
			return line, "not YAML: a control character, got " + strconv.Quote(string(r))
		}
		i += n
	}
	return 0, ""
}

// syntaxError is where the library found a fault and what it is, in words that do not need the grammar where it has
// common causes.
func syntaxError(data []byte, err error) (int, string) {
	line, msg := yamlLine(data, err), yamlMessage(err)
	switch {
	case strings.Contains(msg, "tab character"):
		// It tells the line before the tab's.
		for n := line; n <= line+1; n++ {
			if tabIndented(data, n) {
				line = n
				break
			}
		}
		return line, "a tab: indent with spaces"
	case msg == "found character that cannot start any token" && tabIndented(data, line):
		return line, "a tab: indent with spaces"
	case msg == "did not find expected '-' indicator":
		return line, "the indentation does not fit the lines above"
	case msg == "found unexpected end of stream":
		// The line of a quote on the first line is lost, and that of the end stands for it. The quote is on the last line
		// only if the text before that is good.
		before := firstLines(data, line-1)
		if _, err := parseYAML(bytes.NewReader(before), 1); err != nil && yamlMessage(err) == msg {
			if whole := bytes.Count(bytes.TrimRight(data, "\r\n"), []byte("\n")) + 1; line == whole {
				line = 1
			}
		}
		return line, "a quote that is opened here is not closed"
	}
	return line, msg
}

// tabIndented says whether the indentation of a line, counted from 1, holds a tab.
func tabIndented(data []byte, line int) bool {
	text := data[len(firstLines(data, line-1)):]
	indent := text[:len(text)-len(bytes.TrimLeft(text, " \t"))]
	return bytes.IndexByte(indent, '\t') >= 0
}

// yamlMessage is the library's text without its own prefix and line.
func yamlMessage(err error) string {
	m := strings.TrimPrefix(err.Error(), "yaml: ")
	if rest, ok := strings.CutPrefix(m, "line "); ok {
		if _, after, ok := strings.Cut(rest, ": "); ok {
			m = after
		}
	}
	return strings.ReplaceAll(m, "\n", " ")
}

// yamlLine finds the line of a syntax error. The library tells it only in its text, not at all for the first line, one
// too low for what its parser (not its scanner) finds, and for a fault of indentation it names the line where the whole
// block begins.
func yamlLine(data []byte, err error) int {
	total := bytes.Count(bytes.TrimRight(data, "\r\n"), []byte("\n")) + 1
	msg := yamlMessage(err)
	line := 1
	if m := regexp.MustCompile(`^yaml: line (\d+): `).FindStringSubmatch(err.Error()); m != nil {
		line, _ = strconv.Atoi(m[1]) //nolint:errcheck // digits; absurd ones are cut below
		if strings.HasPrefix(msg, "did not find expected") || strings.Contains(msg, "directive") {
			line++
		}
	}
	switch {
	case strings.Contains(msg, "expected key"), strings.Contains(msg, "'-' indicator"):
		line = max(line, indentLine(data))
	case strings.HasPrefix(msg, "unknown anchor '"):
		name := strings.TrimPrefix(msg, "unknown anchor '")
		if i := bytes.Index(data, []byte("*"+name[:strings.IndexByte(name+"'", '\'')])); i >= 0 {
			line = bytes.Count(data[:i], []byte("\n")) + 1
		}
	}
	return min(max(line, 1), total)
}

// indentLine returns the line that breaks a block: the first one without which the text before it is good. It asks the
// library how far it came and looks back from there, over a bounded number of lines.
func indentLine(data []byte) int {
	const most = 50
	r := &lineReader{rest: data}
	if _, err := parseYAML(r, 1); err == nil {
		return 0
	}
	for k := r.lines - 1; k >= 0 && k > r.lines-most; k-- {
		if _, err := parseYAML(bytes.NewReader(firstLines(data, k)), 1); err == nil {
			return k + 1
		}
	}
	return 0
}

func firstLines(data []byte, n int) []byte {
	end := 0
	for range n {
		i := bytes.IndexByte(data[end:], '\n')
		if i < 0 {
			return data
		}
		end += i + 1
	}
	return data[:end]
}

// A lineReader gives a line at a time and counts them, so that after an error it is known how far the reader came.
type lineReader struct {
	rest  []byte
	begun bool // within a line that was longer than the reader's buffer
	lines int
}

func (r *lineReader) Read(p []byte) (int, error) {
	if len(r.rest) == 0 {
		return 0, io.EOF
	}
	if !r.begun {
		r.lines++
	}
	n := len(r.rest)
	if i := bytes.IndexByte(r.rest, '\n'); i >= 0 {
		n = i + 1
	}
	r.begun = n > len(p)
	n = copy(p, r.rest[:n])
	r.rest = r.rest[n:]
	return n, nil
}
