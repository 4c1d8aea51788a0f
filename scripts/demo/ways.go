package main

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"text/tabwriter"

	"wayout/router/socks/client"
	"wayout/scripts/lab"
)

// row is one request of a table, with what is expected of it.
type row struct {
	say    string                // what is asked, in words
	ask    lab.Ask               // its defaults are table's
	source string                // the address that the origin has to see
	right  func(saw string) bool // in the place of source, where no one address is right
	status int                   // the answer when it is refused
	reply  byte                  // the answer when it is refused by SOCKS5
}

// table asks row by row, and prints what was asked beside what the origin saw.
func (d *demo) table(ctx context.Context, rows []row) error {
	out := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(out, "  asked\tanswer\tthe origin saw\t")
	for _, r := range rows {
		if ctx.Err() != nil {
			return nil
		}
		told, err := d.complete(r.ask).Do()
		if err != nil {
			return fmt.Errorf("%s: %w", r.say, err)
		}
		verdict := r.judge(&told)
		if verdict != "" && verdict != asAsked {
			d.wrong++
		}
		answer, saw := fmt.Sprint(told.Status), told.Seen.Source
		if told.Reply != 0 {
			answer = fmt.Sprintf("0x%02x", told.Reply)
		}
		if told.Status != 200 {
			saw = "nothing: " + told.Body
		}
		fmt.Fprintf(out, "  %s\t%s\t%s\t%s\n", r.say, answer, saw, verdict)
	}
	if err := out.Flush(); err != nil {
		return err
	}
	return d.verdict()
}

func (d *demo) verdict() error {
	if d.wrong > 0 {
		return fmt.Errorf("%d answers were wrong", d.wrong)
	}
	return nil
}

// complete says what goes without saying: from the client, by the open server,
// to the origin's IPv4 address.
func (d *demo) complete(a lab.Ask) lab.Ask {
	if a.From == nil {
		a.From = d.world.Client
	}
	if !a.Proxy.IsValid() {
		a.Proxy = d.at(open)
	}
	if a.Target == "" {
		a.Target = lab.OriginAddr4 + ":80"
	}
	return a
}

const asAsked = "as asked"

// judge compares what came back with what is right: nothing is said of a
// refusal that is as expected.
func (r *row) judge(told *lab.Told) string {
	status := r.status
	if status == 0 && r.reply == 0 {
		status = 200
	}
	switch {
	case told.Status != status || told.Reply != r.reply:
		return fmt.Sprintf("WRONG: not %d, 0x%02x", status, r.reply)
	case status != 200:
		return ""
	case r.right != nil && !r.right(told.Seen.Source):
		return "WRONG"
	case r.right == nil && told.Seen.Source != r.source:
		return "WRONG: not " + r.source
	}
	return asAsked
}

// Ports of the servers.
const (
	open  = 3128 // for everybody
	team  = 3129 // for alice and bob
	route = 3130 // for everybody, by the route
)

func (d *demo) at(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(lab.HostAddr4), port)
}

// origin6 is a target that has no IPv4 address.
func origin6() string { return "[" + lab.OriginAddr6 + "]:80" }

func header(value string) []string { return []string{"X-Egress-Path: " + value} }

// basic is the header that says a user name, with the password of both users.
func basic(user string) string {
	return "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

func (d *demo) selections(ctx context.Context) error {
	v4, v6 := lab.Egress4(), lab.Egress6()
	fmt.Print("\nEach request says how it wants to leave:\n\n")
	return d.table(ctx, []row{
		{say: "by index: X-Egress-Path: 1", ask: lab.Ask{Header: header("1")}, source: v4[0].String()},
		{say: "by index, the last: 0", ask: lab.Ask{Header: header("0")}, source: v4[7].String()},
		{say: "by index, wrapping: 11", ask: lab.Ask{Header: header("11")}, source: v4[2].String()},
		{say: "by ID: fra-2", ask: lab.Ask{Header: header("fra-2")}, source: v4[1].String()},
		{say: "by ID, through a CONNECT tunnel: lon-3", ask: lab.Ask{Header: header("lon-3"), Tunnel: true}, source: v4[6].String()},
		{say: "by address: " + v4[4].String(), ask: lab.Ask{Header: header(v4[4].String())}, source: v4[4].String()},
		{say: "by map: {\"out\": \"lon-1\"}", ask: lab.Ask{Header: header(`{"out": "lon-1"}`)}, source: v4[4].String()},
		{say: "by ID, to an IPv6 origin: fra-3", ask: lab.Ask{Header: header("fra-3"), Target: origin6()}, source: v6[2].String()},
		{say: "by IPv6 address, through a tunnel", ask: lab.Ask{Header: header(v6[5].String()), Target: origin6(), Tunnel: true}, source: v6[5].String()},
		{say: "not at all: the policy, round_robin", ask: lab.Ask{}, source: v4[0].String()},
		{say: "not at all, once more", ask: lab.Ask{}, source: v4[1].String()},
		{say: "alice asks for fra-4", ask: lab.Ask{Proxy: d.at(team), Header: append(header("fra-4"), basic("alice"))}, source: v4[3].String()},
		{say: "bob is mapped to lon-2 by the operator", ask: lab.Ask{Proxy: d.at(team), Header: []string{basic("bob")}}, source: v4[5].String()},
		{say: "bob asks for fra-1: the operator's map is stronger", ask: lab.Ask{Proxy: d.at(team), Header: append(header("fra-1"), basic("bob"))}, source: v4[5].String()},
	})
}

// userNames shows the parameters of user names, over both protocols.
func (d *demo) userNames(ctx context.Context) error {
	v4 := lab.Egress4()
	first := ""
	same := func(saw string) bool {
		if first == "" {
			first = saw
		}
		return saw == first
	}
	fmt.Print("\nWhere a client can set nothing but a user name and a password, the user name says it:\n\n")
	return d.table(ctx, []row{
		{say: "alice-path-fra-2", ask: lab.Ask{Proxy: d.at(team), Header: []string{basic("alice-path-fra-2")}}, source: v4[1].String()},
		{say: "alice-path-3, by SOCKS5", ask: lab.Ask{Proxy: d.at(team), SOCKS: user("alice-path-3")}, source: v4[2].String()},
		{say: "alice-session-cart7: any path", ask: lab.Ask{Proxy: d.at(team), Header: []string{basic("alice-session-cart7")}}, right: same},
		{say: "alice-session-cart7: the same", ask: lab.Ask{Proxy: d.at(team), Header: []string{basic("alice-session-cart7")}}, right: same},
		{say: "alice-session-cart7, by SOCKS5: the same", ask: lab.Ask{Proxy: d.at(team), SOCKS: user("alice-session-cart7")}, right: same},
	})
}

func user(name string) *client.Dialer { return &client.Dialer{Username: name, Password: password} }

// socks shows SOCKS5 and its extension, on the port of HTTP.
func (d *demo) socks(ctx context.Context) error {
	v4, v6 := lab.Egress4(), lab.Egress6()
	fmt.Print("\nSOCKS5 on the same port; by its extension the greeting says what the header says:\n\n")
	return d.table(ctx, []row{
		{say: "SOCKS5, not at all: the policy", ask: lab.Ask{SOCKS: &client.Dialer{}}, right: func(saw string) bool {
			a, err := netip.ParseAddr(saw)
			return err == nil && slices.Contains(v4, a)
		}},
		{say: "SOCKS5 with lon-4", ask: lab.Ask{SOCKS: &client.Dialer{Extension: "lon-4"}}, source: v4[7].String()},
		{say: "SOCKS5 with {\"out\": 2}, to an IPv6 origin", ask: lab.Ask{SOCKS: &client.Dialer{Extension: `{"out": 2}`}, Target: origin6()}, source: v6[1].String()},
	})
}

// routes shows a route, and a path that is a whole prefix.
func (d *demo) routes(ctx context.Context) error {
	whole := netip.MustParsePrefix(lab.SharedNet6)
	seen := map[netip.Addr]bool{}
	fresh := func(saw string) bool {
		a, err := netip.ParseAddr(saw)
		if err != nil || seen[a] {
			return false
		}
		seen[a] = true
		return whole.Contains(a)
	}
	// Its last address but one: any of the prefix will do.
	very := netip.MustParseAddr("2001:db8:100:cafe:ffff:ffff:ffff:fffe").String()
	wide := row{ask: lab.Ask{Proxy: d.at(route), Header: header("wide"), Target: origin6()}, right: fresh}
	rows := []row{{
		say: "by a route: {\"by-name\": \"out\", \"out\": \"lon-2\"}", source: lab.Egress4()[5].String(),
		ask: lab.Ask{Proxy: d.at(route), Header: header(`{"by-name": "out", "out": "lon-2"}`)},
	}}
	for _, say := range []string{"by a route: wide", "once more: another address", "and once more"} {
		wide.say = say
		rows = append(rows, wide)
	}
	rows = append(rows, row{
		say: "wide, by this very address", source: very,
		ask: lab.Ask{Proxy: d.at(route), Header: header(fmt.Sprintf(`{"by-name": "wide", "wide": %q}`, very)), Target: origin6()},
	})
	fmt.Printf("\nA route leads to other escapers. The one path of wide is all of %s, an address for each connection:\n\n", whole)
	return d.table(ctx, rows)
}

// publication gives an escaper a node at run time.
func (d *demo) publication(ctx context.Context) error {
	const id, addr = "ber-1", "198.51.100.21"
	ask := lab.Ask{Proxy: d.at(route), Header: header(fmt.Sprintf(`{"by-name": "dyn", "dyn": %q}`, id))}
	fmt.Printf("\nThe nodes of dyn are published while it runs:\n\n")
	if err := d.table(ctx, []row{{say: "{\"by-name\": \"dyn\", \"dyn\": \"" + id + "\"}, before", ask: ask, status: 400}}); err != nil || ctx.Err() != nil {
		return err
	}
	nodes := fmt.Sprintf(`[{"id": %q, "ip": %q, "area": "berlin"}]`, id, addr)
	fmt.Printf("\n$ wayout publish dyn - <<<'%s'\n", nodes)
	if err := d.feed(nodes, "publish", "--config", d.config, "dyn", "-"); err != nil {
		return err
	}
	fmt.Println()
	if err := d.until(ctx, "dyn/"+id, "up"); err != nil {
		return err
	}
	return d.table(ctx, []row{{say: "the same, after", ask: ask, source: addr}})
}

func (d *demo) refusals(ctx context.Context) error {
	fmt.Print("\nWhat cannot be honoured is refused, never sent by another path:\n\n")
	return d.table(ctx, []row{
		{say: "an unknown ID: par-1", ask: lab.Ask{Header: header("par-1")}, status: 400},
		{say: "the same, by SOCKS5", ask: lab.Ask{SOCKS: &client.Dialer{Extension: "par-1"}}, reply: 0x02},
		{say: "a broken map: {\"out\":", ask: lab.Ask{Header: header(`{"out":`)}, status: 400},
		{say: "lon-4 owns no IPv6, the origin has nothing else", ask: lab.Ask{Header: header("lon-4"), Target: origin6()}, status: 502},
		{say: "alice asks for lon-1, which is not hers", ask: lab.Ask{Proxy: d.at(team), Header: append(header("lon-1"), basic("alice"))}, status: 403},
		{say: "alice-path-lon-1, by SOCKS5", ask: lab.Ask{Proxy: d.at(team), SOCKS: user("alice-path-lon-1")}, reply: 0x02},
		{say: "nobody asks for fra-1", ask: lab.Ask{Proxy: d.at(team), Header: header("fra-1")}, status: 407},
	})
}

// explain asks why a request would leave as it does.
func (d *demo) explain(context.Context) error {
	target, name := lab.OriginAddr4+":80", "alice-path-fra-2"
	fmt.Printf("\nWhich path a request would take, and why:\n\n$ wayout explain --server team --username %s %s\n\n", name, target)
	return d.command("explain", "--config", d.config, "--server", "team", "--username", name, target)
}
