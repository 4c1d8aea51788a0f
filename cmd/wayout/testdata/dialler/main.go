// Command dialler is a program that knows nothing of paths: it does what its
// arguments say, one after the other, and prints for each the address that the
// other side saw, or the number of the error.
//
//	tcp ADDRESS        a connection, a line each way
//	udp ADDRESS        a datagram from a socket that is not connected, and the answer
//	conn ADDRESS       the same from one that is
//	hold ADDRESS       a connection that is kept; says when it is there and how it ends
//	txt NAME           the text of a name
//	serve ADDRESS      accepts connections until standard input ends
//	bind SOURCE        for those that follow; "-" for none
//	forever ADDRESS ADDRESS   the first three to TCP and UDP, again and again until standard input ends
//	signal             says ready, and ends with 7 on SIGUSR1
//	patience DURATION  how long each of those that follow may take
//	many N             what follows, N times
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// patience bounds what is waited for.
var patience = 20 * time.Second

func main() {
	source := ""
	args, err := repeated(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	next := func() string {
		a := args[0]
		args = args[1:]
		return a
	}
	for len(args) > 0 {
		verb := next()
		switch verb {
		case "bind":
			if source = next(); source == "-" {
				source = ""
			}
		case "forever":
			forever(next(), next())
		case "txt":
			text, err := net.LookupTXT(next())
			say(strings.Join(text, ""), err)
		case "serve":
			serve(next())
		case "hold":
			hold(next())
		case "patience":
			if patience, err = time.ParseDuration(next()); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(2)
			}
		case "signal":
			c := make(chan os.Signal, 1)
			signal.Notify(c, syscall.SIGUSR1)
			fmt.Println("ready")
			<-c
			os.Exit(7)
		default:
			seen, err := once(verb, source, next())
			say(seen, err)
		}
	}
}

// repeated puts what stands behind "many N" there N times.
func repeated(args []string) ([]string, error) {
	i := slices.Index(args, "many")
	if i < 0 {
		return args, nil
	}
	if i+1 == len(args) {
		return nil, errors.New("many of what")
	}
	n, err := strconv.Atoi(args[i+1])
	if err != nil {
		return nil, err
	}
	return append(slices.Clone(args[:i]), slices.Repeat(args[i+2:], n)...), nil
}

func say(seen string, err error) {
	var errno syscall.Errno
	switch {
	case err == nil:
		fmt.Println(seen)
	case errors.As(err, &errno):
		fmt.Println(int(errno))
	default:
		fmt.Println(err)
	}
}

func serve(at string) {
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", at)
	if err != nil {
		say("", err)
		return
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	fmt.Println("serves")
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		c.Close()
	}
}

func hold(to string) {
	c, err := net.Dial("tcp", to)
	if err != nil {
		say("", err)
		return
	}
	defer c.Close()
	fmt.Println("held")
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	_, err = c.Read(make([]byte, 1))
	say("end", err)
}

func forever(tcp, udp string) {
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	n := 0
	for {
		for verb, to := range map[string]string{"tcp": tcp, "udp": udp, "conn": udp} {
			seen, err := once(verb, "", to)
			if err == nil {
				n++
				fmt.Println(seen)
			}
		}
		select {
		case <-ended:
			return
		default:
		}
	}
}

func once(verb, source, to string) (string, error) {
	switch verb {
	case "tcp":
		d := net.Dialer{Timeout: patience}
		d.SetMultipathTCP(false)
		if source != "" {
			d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(source)}
		}
		c, err := d.Dial("tcp", to)
		if err != nil {
			return "", err
		}
		return talk(c)
	case "conn":
		d := net.Dialer{Timeout: patience}
		if source != "" {
			d.LocalAddr = &net.UDPAddr{IP: net.ParseIP(source)}
		}
		c, err := d.Dial("udp", to)
		if err != nil {
			return "", err
		}
		return talk(c)
	case "udp":
		at, err := net.ResolveUDPAddr("udp", to)
		if err != nil {
			return "", err
		}
		c, err := new(net.ListenConfig).ListenPacket(context.Background(), "udp", net.JoinHostPort(source, "0"))
		if err != nil {
			return "", err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			return "", err
		}
		if _, err := c.WriteTo([]byte("who\n"), at); err != nil {
			return "", err
		}
		b := make([]byte, 512)
		n, _, err := c.ReadFrom(b)
		return strings.TrimSpace(string(b[:n])), err
	}
	return "", fmt.Errorf("unknown verb %q", verb)
}

func talk(c net.Conn) (string, error) {
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintln(c, "who"); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	return strings.TrimSpace(line), err
}
