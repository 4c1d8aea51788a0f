package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// A publication has tens of thousands of small objects, and encoding/json takes most of the time of one when it is asked
// for their tokens. So it is asked once whether a text is JSON, and what is here takes a text apart of which that is known.

// elements splits a JSON text that is one array.
func elements(b []byte) ([]json.RawMessage, error) {
	if !json.Valid(b) {
		return nil, notArray(b)
	}
	s := scanner{b: b}
	if s.space(); s.b[s.at] != '[' {
		return nil, errors.New("want a JSON array of nodes")
	}
	var out []json.RawMessage
	for s.at++; s.more(']'); {
		if len(out) == maxPublished {
			return nil, fmt.Errorf("a publication has at most %d nodes", maxPublished)
		}
		out = append(out, s.value())
	}
	return out, nil
}

// notArray says why a text is not one JSON array.
func notArray(b []byte) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	var first json.RawMessage
	if err := dec.Decode(&first); err != nil {
		return notJSON(b, err)
	}
	if first[0] != '[' {
		return errors.New("want a JSON array of nodes")
	}
	rest := bytes.TrimLeft(b[dec.InputOffset():], " \t\r\n")
	return fmt.Errorf("line %d: something follows the array", lineOf(b, int64(len(b)-len(rest))))
}

func lineOf(b []byte, offset int64) int {
	return 1 + bytes.Count(b[:min(max(0, offset), int64(len(b)))], []byte("\n"))
}

// notJSON says where a text is no JSON. The tokens' own errors do not know their place.
func notJSON(b []byte, err error) error {
	var syntax *json.SyntaxError
	var all json.RawMessage
	if whole := json.Unmarshal(b, &all); whole != nil {
		err = whole
	}
	if !errors.As(err, &syntax) || syntax.Offset >= int64(len(b)) && strings.Contains(syntax.Error(), "unexpected end") {
		return errors.New("not JSON: the text ends too early")
	}
	return fmt.Errorf("line %d: not JSON: %w", lineOf(b, syntax.Offset-1), err)
}

// A member is one key of a JSON object with its value as it is written.
type member struct {
	key   string
	value json.RawMessage
}

// objectMembers splits a text that is one JSON object, keys that are repeated included.
func objectMembers(b []byte) ([]member, error) {
	if !json.Valid(b) {
		return nil, errors.New("not a JSON object")
	}
	return members(b)
}

// members is objectMembers of a text that is JSON.
func members(b []byte) ([]member, error) {
	s := scanner{b: b}
	if s.space(); s.b[s.at] != '{' {
		return nil, fmt.Errorf("want a JSON object, got %s", quote(string(b)))
	}
	out := make([]member, 0, 8)
	for s.at++; s.more('}'); {
		key := s.value()
		s.space()
		s.at++ // the colon
		s.space()
		text, _ := stringOf(key)
		out = append(out, member{text, s.value()})
	}
	return out, nil
}

// stringOf reads a JSON value that is a string.
func stringOf(value json.RawMessage) (text string, ok bool) {
	if value[0] != '"' {
		return "", false
	}
	if bytes.IndexByte(value, '\\') < 0 {
		return string(value[1 : len(value)-1]), true
	}
	err := json.Unmarshal(value, &text)
	return text, err == nil
}

// scanner goes through a text that is known to be JSON.
type scanner struct {
	b  []byte
	at int
}

func (s *scanner) space() {
	for s.at < len(s.b) && (s.b[s.at] == ' ' || s.b[s.at] == '\t' || s.b[s.at] == '\r' || s.b[s.at] == '\n') {
		s.at++
	}
}

// more goes to the next element, and reports whether there is one before the end.
func (s *scanner) more(end byte) bool {
	s.space()
	if s.b[s.at] == ',' {
		s.at++
		s.space()
	}
	return s.b[s.at] != end
}

// value takes the value that is next.
func (s *scanner) value() json.RawMessage {
	from, depth := s.at, 0
	for s.at < len(s.b) {
		switch s.b[s.at] {
		case '"':
			s.text()
			if depth == 0 {
				return s.b[from:s.at]
			}
			continue
		case '{', '[':
			depth++
		case '}', ']':
			if depth == 0 { // of what the value is in
				return s.b[from:s.at]
			}
			if depth--; depth == 0 {
				s.at++
				return s.b[from:s.at]
			}
		case ',', ' ', '\t', '\r', '\n':
			if depth == 0 { // after a number or a word
				return s.b[from:s.at]
			}
		}
		s.at++
	}
	return s.b[from:]
}

// text goes behind a string.
func (s *scanner) text() {
	for s.at++; s.b[s.at] != '"'; s.at++ {
		if s.b[s.at] == '\\' {
			s.at++
		}
	}
	s.at++
}
