package client_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"wayout/router/escaper"
	"wayout/router/relay"
	"wayout/router/socks"
	"wayout/router/socks/client"
	"wayout/selection"
)

// A server with two paths; the client says which one its connection takes, and
// learns where it really leaves from.
func Example() {
	proxy, stop, err := startProxy()
	if err != nil {
		fmt.Println(err)
		return
	}
	defer stop()
	origin, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = origin.Close() }()
	go func() {
		for {
			c, err := origin.Accept()
			if err != nil {
				return
			}
			_, _ = fmt.Fprintf(c, "hello, %s\n", c.RemoteAddr().(*net.TCPAddr).IP)
			_ = c.Close()
		}
	}()

	for _, path := range []string{"left", "right", "1", `{"out": "127.0.0.12"}`, "nowhere", `{"out":`} {
		d := client.Dialer{Proxy: proxy, Extension: path}
		conn, err := d.DialContext(context.Background(), "tcp", origin.Addr().String())
		var reply *client.ReplyError
		switch {
		case errors.As(err, &reply):
			fmt.Printf("%s: reply 0x%02x\n", path, reply.Code)
		case errors.Is(err, client.ErrSelection):
			fmt.Printf("%s: malformed\n", path)
		case err != nil:
			fmt.Println(err)
		default:
			line, _ := bufio.NewReader(conn).ReadString('\n')
			fmt.Printf("%s: %s", path, line)
			_ = conn.Close()
		}
	}
	// Output:
	// left: hello, 127.0.0.11
	// right: hello, 127.0.0.12
	// 1: hello, 127.0.0.11
	// {"out": "127.0.0.12"}: hello, 127.0.0.12
	// nowhere: reply 0x02
	// {"out":: malformed
}

// startProxy serves SOCKS with the paths out/left and out/right.
func startProxy() (addr string, stop func(), err error) {
	filter, err := escaper.NewFilter(nil, []string{"loopback"}, nil)
	if err != nil {
		return "", nil, err
	}
	out, err := escaper.NewDirect(escaper.Options{
		Name: "out", Filter: filter, EnableSelection: true, ConnectTimeout: 10 * time.Second,
		Nodes: []escaper.NodeOptions{
			{ID: "left", V4: netip.MustParseAddr("127.0.0.11"), Weight: 1},
			{ID: "right", V4: netip.MustParseAddr("127.0.0.12"), Weight: 1},
		},
	})
	if err != nil {
		return "", nil, err
	}
	table, err := escaper.NewTable(out)
	if err != nil {
		return "", nil, err
	}
	for _, p := range table.Paths() {
		p.SetFamilyState(selection.V4, escaper.Up, "")
	}
	table.Publish()
	engine, err := relay.New(relay.Options{Workers: 1})
	if err != nil {
		return "", nil, err
	}
	var door escaper.Door
	door.Swap(table)
	server, err := socks.New(socks.Options{
		Name: "socks", Escaper: "out", Extension: true, Open: door.Open, Relay: engine,
	})
	if err != nil {
		return "", nil, err
	}
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return "", nil, err
	}
	bare, err := relay.NewListener(l)
	if err != nil {
		return "", nil, err
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(bare) }()
	return l.Addr().String(), func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := errors.Join(server.Shutdown(ctx), <-served, engine.Close()); err != nil {
			fmt.Println(err)
		}
	}, nil
}
