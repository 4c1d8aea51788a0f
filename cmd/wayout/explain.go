package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"wayout/router"
	"wayout/router/escaper"
)

// defaultTargetPort is that of a target that names none.
const defaultTargetPort = 443

// explain says which path a request would take, and why.
func explain(e *env, args []string) error {
	f := newFlags(e, "explain").withConfig().withJSON()
	f.form = " [--server S] [--user U] [--header V] [--username N] [--client IP] [--resolve]"
	var q router.Question
	f.StringVar(&q.Server, "server", "", "`name` of the server that is asked (default: the first)")
	f.StringVar(&q.User, "user", "", "`name` of the user, taken to be authenticated")
	f.StringVar(&q.Username, "username", "", "user `name` with parameters, in the place of --user")
	f.StringVar(&q.Header, "header", "", "`value` of the path selection header or the SOCKS extension")
	f.BoolVar(&q.Resolve, "resolve", false, "ask name servers for the target's name")
	client := f.String("client", "", "`address` of the client (default 127.0.0.1)")
	local := f.String("local", "", "`address`, or address:port, that the client connected to (default: the server's first)")
	rest, err := f.parse(args, "TARGET")
	if err != nil {
		return err
	}
	if q.Target, err = parseTarget(rest[0]); err != nil {
		return err
	}
	if *client != "" {
		if q.Client, err = netip.ParseAddr(*client); err != nil {
			return usageError("--client: want an IP address, got %q", *client)
		}
	}
	if q.Local, err = parseLocal(*local); err != nil {
		return err
	}
	c, _, err := f.hostConfig()
	if err != nil {
		return err
	}
	v, err := router.Explain(context.Background(), c, q)
	if err != nil {
		return err
	}
	if *f.json {
		err = json.NewEncoder(e.stdout).Encode(verdictJSON(v, q.Target))
	} else {
		printVerdict(e, v)
	}
	if err == nil && v.Err != nil {
		return &exitError{code: exitFailed} // it has been said
	}
	return err
}

// parseTarget reads HOST:PORT, or HOST alone.
func parseTarget(s string) (escaper.Target, error) {
	host, port := s, strconv.Itoa(defaultTargetPort)
	if a, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
		return escaper.Target{Addr: a.Unmap(), Port: defaultTargetPort}, nil
	}
	if strings.Contains(s, ":") {
		var err error
		if host, port, err = net.SplitHostPort(s); err != nil {
			return escaper.Target{}, usageError("want HOST:PORT or HOST, got %q", s)
		}
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return escaper.Target{}, usageError("a port is 1 to 65535, got %q", port)
	}
	t := escaper.Target{Port: uint16(n)}
	if a, err := netip.ParseAddr(host); err == nil {
		t.Addr = a.WithZone("").Unmap()
		return t, nil
	}
	if _, ok := escaper.ParseHost([]byte(host)); !ok || host == "" {
		return escaper.Target{}, usageError("%q is no host name and no address", host)
	}
	t.Host = host
	return t, nil
}

func parseLocal(s string) (netip.AddrPort, error) {
	if s == "" {
		return netip.AddrPort{}, nil
	}
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.AddrPortFrom(a.Unmap(), 0), nil
	}
	ap, err := netip.ParseAddrPort(s)
	if err != nil {
		return netip.AddrPort{}, usageError("--local: want ADDRESS or ADDRESS:PORT, got %q", s)
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()), nil
}

func printVerdict(e *env, v router.Verdict) {
	fmt.Fprintf(e.stdout, "server %s\n", v.Server)
	for _, s := range v.Steps {
		fmt.Fprintln(e.stdout, "  "+s)
	}
	if v.Err != nil {
		fmt.Fprintf(e.stdout, "refused with %d: %s\n", v.Status, v.Err)
		return
	}
	from := "main routing's choice"
	if v.Source.IsValid() {
		from = v.Source.String()
	}
	any := ""
	if v.Any {
		any = " (this time; another request may leave otherwise)"
	}
	fmt.Fprintf(e.stdout, "path %s, source %s%s\n", v.Choice.Path, from, any)
}

// verdict is the machine output.
type verdict struct {
	Version   int      `json:"version"`
	OK        bool     `json:"ok"`
	Server    string   `json:"server"`
	Target    string   `json:"target"`
	Selection string   `json:"selection"`
	By        string   `json:"selection_source"`
	Chain     []string `json:"chain"`
	Path      string   `json:"path"`
	SourceIP  *string  `json:"source_ip"`
	MayVary   bool     `json:"may_vary"`
	Steps     []string `json:"steps"`
	Status    int      `json:"status"`
	Error     string   `json:"error,omitempty"`
}

func verdictJSON(v router.Verdict, t escaper.Target) verdict {
	out := verdict{
		Version: 1, OK: v.Err == nil, Server: v.Server, Target: t.String(),
		Selection: v.Choice.Asked, By: v.Choice.Source.String(), Chain: v.Chain, Path: v.Choice.Path,
		MayVary: v.Any, Steps: v.Steps, Status: v.Status,
	}
	if v.Source.IsValid() {
		s := v.Source.String()
		out.SourceIP = &s
	}
	if v.Err != nil {
		out.Error = v.Err.Error()
	}
	if out.Chain == nil {
		out.Chain = []string{}
	}
	if out.Steps == nil {
		out.Steps = []string{}
	}
	return out
}
