package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/textproto"
	"strings"
)

// The origin answers every connection with the source address that it sees.
// Its first line says what comes then:
//
//	GET ...   HTTP: the address is the body; the connection is kept
//	echo      the address and LF, then whatever comes
//	send      the address and LF, then bytes until the client goes
//	take      the address and LF, then it reads until the client ends
func serveOrigin(addrs []string) error {
	failed := make(chan error)
	for _, a := range addrs {
		l, err := net.Listen("tcp", a)
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					failed <- err
					return
				}
				go func() {
					defer c.Close()
					// A client that goes is the usual end.
					_ = answer(c)
				}()
			}
		}()
	}
	fmt.Println("ready")
	return <-failed
}

const bulkBuffer = 256 << 10

func answer(c net.Conn) error {
	from, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return errors.New("not TCP")
	}
	source := from.AddrPort().Addr().Unmap().String()
	in := bufio.NewReaderSize(c, 2048)
	line, err := in.ReadSlice('\n')
	if err != nil {
		return err
	}
	word, _, _ := strings.Cut(strings.TrimSpace(string(line)), " ")
	if word == "GET" {
		return answerHTTP(c, in, source)
	}
	if _, err := io.WriteString(c, source+"\n"); err != nil {
		return err
	}
	switch word {
	case "echo":
		buf := make([]byte, 2048)
		for {
			n, err := in.Read(buf)
			if err != nil {
				return err
			}
			if _, err := c.Write(buf[:n]); err != nil {
				return err
			}
		}
	case "send":
		buf := make([]byte, bulkBuffer)
		for {
			if _, err := c.Write(buf); err != nil {
				return err
			}
		}
	case "take":
		buf := make([]byte, bulkBuffer)
		for {
			if _, err := c.Read(buf); err != nil {
				return err
			}
		}
	}
	return nil
}

// answerHTTP answers requests whose first line has been read.
func answerHTTP(c net.Conn, in *bufio.Reader, source string) error {
	response := fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nCache-Control: no-store\r\nContent-Length: 64\r\n\r\n%-63s\n", source)
	for {
		closing := false
		for {
			line, err := in.ReadSlice('\n')
			if err != nil {
				return err
			}
			line = textproto.TrimBytes(line)
			if len(line) == 0 {
				break
			}
			closing = closing || strings.EqualFold(string(line), "connection: close")
		}
		if _, err := c.Write(response); err != nil || closing {
			return err
		}
		if _, err := in.ReadSlice('\n'); err != nil { // the next request's first line
			return err
		}
	}
}
