// Package config reads the configuration file: YAML to typed values, and every mistake of a file at once, each with the
// line of the key or value that is wrong.
//
// The structs of this package are the one table of what can be configured. Their tags name each key, its type, unit,
// default and meaning; the decoder reads a file by them and Reference prints them. A key is added by adding a field.
//
//	key       the key in the file; a field without one is not read from it
//	alias     another key with the same meaning
//	type      the type word, see kinds; absent for structs (a map) and slices of structs (a list of maps)
//	of        the words of a "one of" type
//	ref       the section whose names are the possible values
//	min, max  bounds of numbers, sizes and durations
//	default   in the words of the file; absent: the zero value
//	required  "yes": the key has to be there
//	for       the types that have the key, in a struct with a type; absent: all. In another type the field is zero
//	unit      what a bare number counts
//	meaning   one sentence
package config

import (
	"log/slog"
	"net/netip"
	"time"

	"wayout/selection"
)

// Config is a whole configuration, checked: names are unique, references lead somewhere, pins agree. It is not changed
// after it was made.
type Config struct {
	Control      Control       `key:"control" meaning:"The control socket."`
	Metrics      Metrics       `key:"metrics" meaning:"HTTP for the operator: /metrics, /healthz and a dashboard at /."`
	Log          Log           `key:"log" meaning:"The log, on standard error."`
	Accounting   bool          `key:"accounting" type:"switch" default:"on" meaning:"Count and guard packets in the kernel by eBPF. off: run without, and say so at start."`
	KeepOnStop   bool          `key:"keep_on_stop" type:"switch" default:"off" meaning:"Leave rules, routes and addresses in place on SIGTERM."`
	DrainTimeout time.Duration `key:"drain_timeout" type:"duration" default:"30s" min:"0s" max:"24h" meaning:"The longest that open connections may go on after SIGTERM."`
	Keepalive    Keepalive     `key:"http_forward_upstream_keepalive" meaning:"Upstream connections kept for the next forwarded request of the same path, source address, user and destination."`
	Netcfg       Netcfg        `key:"netcfg" meaning:"What of the host's number spaces is wayout's."`
	Resolvers    []Resolver    `key:"resolver" meaning:"How names become addresses."`
	Uplinks      []Uplink      `key:"uplink" meaning:"Ways off the host."`
	Escapers     []Escaper     `key:"escaper" meaning:"What carries requests out: egress paths and how one is chosen."`
	UserGroups   []UserGroup   `key:"user_group" meaning:"Users that servers authenticate."`
	Servers      []Server      `key:"server" meaning:"Front ends that accept client traffic."`
	Pins         []Pin         `key:"pin" meaning:"Local processes that leave by a path, without a proxy in between."`
}

// Control is the control socket.
type Control struct {
	Socket string `key:"socket" type:"socket path" default:"/run/wayout/control.sock" meaning:"Unix socket of the commands, for root only."`
}

// Metrics is the operator's HTTP listener.
type Metrics struct {
	// Listen is the zero AddrPort when metrics are off.
	Listen netip.AddrPort `key:"listen" type:"ip:port" meaning:"Where /metrics and /healthz answer, to everyone who can connect. Absent: nowhere. :PORT is all addresses, and PORT alone is refused; port 0 is any free one."`
}

// Log is the log on standard error.
type Log struct {
	Format string     `key:"format" type:"one of" of:"text json" default:"text" meaning:"One line an event, as key=value or as JSON."`
	Level  slog.Level `key:"level" type:"level" of:"debug info warn error" default:"info" meaning:"The least severe level that is logged."`
}

// Netcfg says which numbers of the host's kernel are wayout's. 0 stands for the program's own choice.
type Netcfg struct {
	MarkMask     uint32 `key:"mark_mask" type:"number" min:"1" meaning:"Bits of the packet mark (fwmark) that are wayout's, as 0x.... At least 9 of them. Absent: 0xff01ffff. Leave out what other software on the host matches (Kubernetes 0x4000 and 0x8000, Tailscale 0xff0000)."`
	TableBase    uint32 `key:"table_base" type:"number" min:"256" max:"4294967039" meaning:"Number of the first uplink's routing table; 256 from it on are wayout's. Absent: 11900."`
	RulePriority uint32 `key:"rule_priority" type:"number" min:"1" max:"32510" meaning:"Priority of the first routing rule; 256 from it on are wayout's, all before the rule of the main table (32766). Absent: 11900."`
}

// DefaultResolver is the name of the resolver of an escaper that names none. One of type system is made by that name when
// the file has none.
const DefaultResolver = "system"

// Resolver turns names into addresses.
type Resolver struct {
	Name string `key:"name" type:"name" required:"yes" meaning:"How escapers call it."`
	Type string `key:"type" type:"one of" of:"system dns" required:"yes" meaning:"system: servers and search list of resolv.conf and /etc/hosts, asked by wayout's own sockets, cached. dns: the servers given here, likewise."`
	// Server is in the order in which servers are asked.
	Server []netip.AddrPort `key:"server" type:"name servers" for:"dns" required:"yes" meaning:"Name servers, in the order in which they are asked: IP or IP:PORT, one or a list. Port 53 when there is none."`
	Bind   string           `key:"bind" type:"one of" of:"path" meaning:"path: queries leave by the path that the request will take, and their answers are remembered for that path alone. Absent: by the host's main routing."`
	// Hosts has names in lower case, without a dot at the end.
	Hosts      map[string][]netip.Addr `key:"hosts" type:"map of addresses" meaning:"Names that are answered from here and never asked for: each with an address or a list of addresses. A family without an address has none."`
	ServeStale time.Duration           `key:"serve_stale" type:"duration" default:"0s" min:"0s" max:"7d" meaning:"How long past its TTL an answer may still be given when no server answers (RFC 8767). 0: never."`
	Timeout    time.Duration           `key:"timeout" type:"duration" default:"0s" min:"0s" max:"1m" meaning:"How long one server is waited for. 0: the resolver's own choice."`
	QueryCase  bool                    `key:"query_case" type:"switch" for:"dns" default:"on" meaning:"Mix the case of the letters in a query at random and want the same in the answer (0x20), against forged answers."`
}

// Uplink is a way off the host.
type Uplink struct {
	Name            string     `key:"name" type:"name" required:"yes" meaning:"How escapers and nodes call it."`
	Interface       string     `key:"interface" type:"interface" required:"yes" meaning:"The network interface."`
	Gateway4        netip.Addr `key:"gateway4" type:"ipv4" meaning:"Next hop for IPv4. Absent: on-link only."`
	Gateway6        netip.Addr `key:"gateway6" type:"ipv6" meaning:"Next hop for IPv6. Absent: on-link only."`
	ManageAddresses bool       `key:"manage_addresses" type:"switch" default:"off" meaning:"Put missing node addresses on the interface (/32 and /128, noprefixroute, IPv6 deprecated)."`
}

// Escaper carries requests out by one of its nodes: egress paths (direct_*), next escapers (route_*) or next-hop proxies
// (proxy_*).
type Escaper struct {
	Name string `key:"name" type:"name" required:"yes" meaning:"How servers, routes and selections call it; the first part of its paths' names."`
	Type string `key:"type" type:"one of" of:"direct_fixed direct_float route_select route_mapping route_failover route_upstream route_client proxy_http proxy_https proxy_socks5 proxy_float" required:"yes" meaning:"direct_fixed: nodes are addresses, prefixes and interfaces of this host. direct_float: nodes are published at run time. route_select: a next escaper by name, else by policy. route_mapping: by index. route_failover: the first that is up. route_upstream: by the target. route_client: by the client. proxy_http, proxy_https, proxy_socks5: nodes are proxies of that kind. proxy_float: nodes are proxies that are published at run time."`
	// Resolver is never empty where the type has one: DefaultResolver when the file names none.
	Resolver            string           `key:"resolver" type:"name" ref:"resolver" for:"direct_fixed direct_float proxy_http proxy_https proxy_socks5 proxy_float" meaning:"Who resolves the names that are dialled. Absent: one of type system."`
	ResolveStrategy     string           `key:"resolve_strategy" type:"one of" of:"any ipv4_only ipv6_only ipv4_first ipv6_first" for:"direct_fixed direct_float proxy_http proxy_https proxy_socks5 proxy_float" default:"any" meaning:"Which of a name's addresses are dialled, and which first. any: both families, in the order of RFC 6724."`
	EnablePathSelection bool             `key:"enable_path_selection" type:"switch" default:"off" meaning:"Whether clients may choose a node. off: a request in which a client chooses one is refused."`
	PickPolicy          selection.Policy `key:"pick_policy" type:"pick policy" of:"random serial round_robin rendezvous least_conn jump ketama" for:"direct_fixed direct_float route_select route_mapping proxy_http proxy_https proxy_socks5 proxy_float" default:"random" meaning:"How a node is chosen when nothing selects one."`
	PickKey             string           `key:"pick_key" type:"one of" of:"client_ip user host" for:"direct_fixed direct_float route_select route_mapping proxy_http proxy_https proxy_socks5 proxy_float" default:"client_ip" meaning:"What the hashing policies hash."`
	StrictIndex         bool             `key:"index" type:"index" of:"wrap strict" default:"wrap" meaning:"An index above the number of nodes wraps (and 0 is the last), or is refused."`
	Filter              Filter           `key:"egress_network_filter" for:"direct_fixed direct_float" meaning:"Which addresses may be dialled; the longest prefix wins, deny on a tie."`

	// Nodes is what nodes and bind_ip say, ranges spelled out, each node with the interface and the uplink that it
	// uses. An escaper with neither and an interface has one node, without an address, named like the interface.
	Nodes []Node `key:"nodes" type:"list of nodes" for:"direct_fixed" meaning:"The egress paths, in the order of their indexes."`
	// Peers is what nodes says in a proxy_* escaper.
	Peers []Peer `key:"nodes" for:"proxy_http proxy_https proxy_socks5" required:"yes" meaning:"The next-hop proxies, in the order of their indexes."`
	// BindIP is the addresses of bind_ip, ranges spelled out. Their nodes, and those of its prefixes, are in Nodes.
	BindIP    []netip.Addr `key:"bind_ip" type:"addresses" for:"direct_fixed" meaning:"Shorthand for nodes: one per address or prefix, in order, whose ID is the address or prefix. FIRST-LAST is a range."`
	Interface string       `key:"interface" type:"interface" for:"direct_fixed direct_float" meaning:"SO_BINDTODEVICE for nodes that name no interface; alone, it makes one node of a direct_fixed, without an address."`
	Uplink    string       `key:"uplink" type:"name" ref:"uplink" for:"direct_fixed direct_float" meaning:"The uplink of nodes that name none. Absent: the host's main routing."`
	Neighbour string       `key:"neighbour" type:"one of" of:"auto answer off" for:"direct_fixed" default:"auto" meaning:"Whether neighbour solicitations for all of a prefix are answered on the uplink's interface. auto: where the interface has an address inside the prefix. off: where the upstream routes the prefix to this host."`
	Cache     string       `key:"cache" type:"file path" for:"direct_float proxy_float" meaning:"The file that keeps the published nodes over a restart. Absent: none, and it starts without nodes."`

	// Next is in the order of the indexes. It holds no escaper twice.
	Next        []Next     `key:"next" alias:"next_nodes" type:"list of escapers" for:"route_select route_mapping route_failover" required:"yes" meaning:"The next escapers, in the order of their indexes; in a route_failover, the first one that is up is taken. Each one is a name, or a map of escaper and weight."`
	ExactMatch  []HostRule `key:"exact_match" type:"host rules" for:"route_upstream" meaning:"The target's host is one of these. Asked before the other rules."`
	SuffixMatch []HostRule `key:"child_match" alias:"suffix_match" type:"domain rules" for:"route_upstream" meaning:"The target's host is one of these domains or below one; the longest wins."`
	SubnetMatch []NetRule  `key:"subnet_match" for:"route_upstream route_client" meaning:"route_upstream: the target is an address in one of these networks (a name is not resolved for it). route_client: the client's address is. The longest wins."`
	RegexMatch  []HostRule `key:"regex_match" type:"regex rules" for:"route_upstream" meaning:"The target's host, in lower case, is matched as a whole by one of these expressions, in the order written. Asked after the other rules."`
	UserMatch   []HostRule `key:"user_match" type:"user rules" for:"route_client" meaning:"The client is one of these users. Asked before subnet_match."`
	DefaultNext string     `key:"default_next" type:"name" ref:"escaper" for:"route_upstream route_client" required:"yes" meaning:"The next escaper when no rule fits."`

	PassSelection       bool          `key:"pass_selection" type:"switch" default:"off" for:"proxy_http proxy_https proxy_socks5 proxy_float" meaning:"Hand the client's selection on to the proxy. off: it is stripped."`
	PeerSelectionHeader string        `key:"path_selection_header" alias:"egress_path_selection_header" type:"header name" for:"proxy_http proxy_https proxy_float" default:"X-Egress-Path" meaning:"The header that carries a selection which is handed on."`
	TLSName             string        `key:"tls_name" type:"host" for:"proxy_https proxy_float" meaning:"The name that the proxy's certificate has to be for. Absent: the host of addr."`
	TLSCA               string        `key:"tls_ca" type:"file path" for:"proxy_https proxy_float" meaning:"PEM file of the authorities that may have signed the proxy's certificate. Absent: those of the host."`
	HandshakeTimeout    time.Duration `key:"peer_negotiation_timeout" alias:"handshake_timeout" type:"duration" for:"proxy_http proxy_https proxy_socks5 proxy_float" default:"10s" min:"10ms" max:"10m" meaning:"The longest from the connection to the proxy until it has connected to the target."`

	ConnectTimeout time.Duration `key:"connect_timeout" type:"duration" for:"direct_fixed direct_float proxy_http proxy_https proxy_socks5 proxy_float" default:"10s" min:"10ms" max:"10m" meaning:"The longest that connecting to a target, or to the next-hop proxy, may take, all attempts together; over it: 504."`
	HappyEyeballs  HappyEyeballs `key:"happy_eyeballs" for:"direct_fixed direct_float proxy_http proxy_https proxy_socks5 proxy_float" meaning:"Racing a target's addresses (RFC 8305)."`

	Health Health `key:"health" for:"direct_fixed direct_float proxy_http proxy_https proxy_socks5 proxy_float" meaning:"Turn a path down by the connections that fail on it. Absent: off, and a path is down only by what the kernel and probe say."`
	Probe  Probe  `key:"probe" for:"direct_fixed direct_float proxy_http proxy_https proxy_socks5 proxy_float" meaning:"Try each path again and again, by the path itself; it is up once a probe has succeeded. Absent: off."`
	Spill  bool   `key:"spill" type:"switch" default:"off" for:"direct_fixed direct_float proxy_http proxy_https proxy_socks5 proxy_float" meaning:"Where the policy has picked a path whose local ports towards the target are used up, pick another. Never for a path that was selected, nor for a strict session."`
}

// Health is when the connections that fail on a path turn it down.
type Health struct {
	On           bool          // the file has it
	Failures     int           `key:"failures" type:"number" default:"5" min:"1" max:"100" meaning:"How many connections in a row have to fail, in time or for want of a route or by a reset before they are made; one that is refused is none of them, save by a next-hop proxy."`
	Destinations int           `key:"destinations" type:"number" default:"3" min:"1" max:"16" meaning:"How many addresses these have to be to, so that one dead target is not the path's fault. A path to a next-hop proxy needs one."`
	Window       time.Duration `key:"window" type:"duration" default:"30s" min:"1s" max:"1h" meaning:"The time within which they fail."`
	Hold         time.Duration `key:"hold" type:"duration" default:"10s" min:"100ms" max:"5m" meaning:"How long the path stays down then, at least; twice as long each time that it goes down again soon, 5m at most."`
}

// Probe is how paths are tried. It is off when TCP and HTTP are empty; one of them is.
type Probe struct {
	TCP      string        `key:"tcp" type:"host:port" meaning:"Where a connection has to be made to. Give it or http."`
	HTTP     string        `key:"http" type:"url" meaning:"What has to be answered with a status of 200 to 399, at http:// or https:// (with a certificate that is verified). Give it or tcp."`
	Interval time.Duration `key:"interval" type:"duration" default:"10s" min:"100ms" max:"1h" meaning:"The time between two probes of a path, a tenth more or less."`
	Timeout  time.Duration `key:"timeout" type:"duration" default:"3s" min:"10ms" max:"1m" meaning:"The longest that a probe may take; not above interval."`
	Fall     int           `key:"fall" type:"number" default:"3" min:"1" max:"100" meaning:"How many probes in a row have to fail until a path that was up is down."`
	Rise     int           `key:"rise" type:"number" default:"2" min:"1" max:"100" meaning:"How many probes in a row have to succeed until a path that was down is up."`
	EIP      bool          `key:"eip" type:"switch" default:"off" meaning:"With http: the first address in the body has to be the node's eip, where it has one of that family. Another address, or none, is a failure."`
}

// Next is a next escaper of a route.
type Next struct {
	Escaper string `key:"escaper" type:"name" ref:"escaper" required:"yes" meaning:"Its name."`
	Weight  uint16 `key:"weight" type:"number" default:"1" min:"0" max:"65535" meaning:"Its share when a policy chooses. 0: only by selection. Not in a route_failover."`
}

// HostRule is one rule of a route: what it matches, and where that goes. Hosts are, by the rule's list, hosts, domains
// and users as they are compared (hosts and domains in lower case without a dot at the end, addresses in their short
// form), or regular expressions (RE2) that are still to be anchored at both ends. No list holds one of them twice.
type HostRule struct {
	Next  string
	Hosts []string
}

// The rules as a file has them: HostRule with the key of each list.
type (
	exactRule struct {
		Next  string   `key:"next" type:"name" ref:"escaper" required:"yes" meaning:"The next escaper."`
		Hosts []string `key:"hosts" type:"hosts" required:"yes" meaning:"Host names and addresses."`
	}
	domainRule struct {
		Next  string   `key:"next" type:"name" ref:"escaper" required:"yes" meaning:"The next escaper."`
		Hosts []string `key:"domains" type:"domains" required:"yes" meaning:"Domains: each stands for itself and everything below it."`
	}
	regexRule struct {
		Next  string   `key:"next" type:"name" ref:"escaper" required:"yes" meaning:"The next escaper."`
		Hosts []string `key:"regexes" type:"regular expressions" required:"yes" meaning:"Regular expressions (RE2), each for the whole of a host in lower case."`
	}
	userRule struct {
		Next  string   `key:"next" type:"name" ref:"escaper" required:"yes" meaning:"The next escaper."`
		Hosts []string `key:"users" type:"user names" required:"yes" meaning:"Users of any user group."`
	}
)

// NetRule is one rule of a route: networks, and where they go. No escaper has one network twice.
type NetRule struct {
	Next    string         `key:"next" type:"name" ref:"escaper" required:"yes" meaning:"The next escaper."`
	Subnets []netip.Prefix `key:"subnets" type:"network list" required:"yes" meaning:"Networks and addresses."`
}

// Peer is one next-hop proxy.
type Peer struct {
	// ID is never empty: the text of Addr when the file has none.
	ID       string `key:"id" type:"name" meaning:"Its name in selections. Absent: addr, unless that is no name (an IPv6 address)."`
	Addr     string `key:"addr" type:"host:port" required:"yes" meaning:"Where it listens: a host name or an address, and a port."`
	Username string `key:"username" type:"credential" meaning:"The user name that it is given. Absent: none, without authentication."`
	Password string `key:"password" type:"credential" meaning:"The password beside username, as it is: keep the file for root alone."`
	Path     string `key:"path" type:"path" meaning:"The egress path to it: ESCAPER/ID of a direct_fixed. Absent: the host's main routing."`
	Weight   uint16 `key:"weight" type:"number" default:"1" min:"0" max:"65535" meaning:"Its share when a policy chooses. 0: only by selection."`
	// EIP has one address of a family at most.
	EIP []netip.Addr `key:"eip" type:"public addresses" meaning:"The address that targets see; one, or a list of one of each family. See probe.eip."`
}

// Filter says which resolved addresses an escaper may dial.
type Filter struct {
	Deny  []Rule `key:"deny" type:"networks" meaning:"What is refused, besides what is refused unless allowed: unspecified, loopback, link-local, multicast, broadcast, 100::/64 and the host's own addresses."`
	Allow []Rule `key:"allow" type:"networks" meaning:"What is allowed although a shorter prefix, or the built-in list, refuses it."`
}

// Rule is one entry of a Filter: a class, or else a prefix (a single address is a /32 or /128).
type Rule struct {
	Class  Class
	Prefix netip.Prefix
}

// Class names a set of addresses that is not one prefix.
type Class string

// The classes. ClassNone is that of a Rule with a prefix.
const (
	ClassNone      Class = ""
	ClassPrivate   Class = "private"   // RFC 1918, RFC 4193
	ClassLoopback  Class = "loopback"  // 127.0.0.0/8, ::1
	ClassLinkLocal Class = "linklocal" // 169.254.0.0/16, fe80::/10
	ClassMulticast Class = "multicast" // 224.0.0.0/4, ff00::/8
	ClassSelf      Class = "self"      // the host's own addresses
)

// Node is one egress path of a direct_fixed escaper.
type Node struct {
	ID         string
	IPv4, IPv6 netip.Addr   // the zero Addr: none
	Net4, Net6 netip.Prefix // a whole prefix in the place of IPv4 or IPv6; the zero Prefix: none
	Interface  string       // to bind to; empty: none
	Uplink     string       // empty: the host's main routing
	Weight     uint16
	EIP        []netip.Addr // what targets see, one of a family at most; empty: nobody said
}

// nodeSpec is a node as the file has it, before ranges are spelled out.
type nodeSpec struct {
	ID        string `key:"id" type:"name" meaning:"Its name in selections. Absent: its address or prefix, the IPv4 one when it has both. With a range, each node is called ID/ADDRESS, or ADDRESS when there is no ID."`
	IPv4      span   `key:"ipv4" type:"ipv4, range or prefix" meaning:"Source address for IPv4 targets. FIRST-LAST is a range: one node per address. A prefix, /8 to /30, is one node that sends from any of its addresses."`
	IPv6      span   `key:"ipv6" type:"ipv6, range or prefix" meaning:"Source address for IPv6 targets. Beside a range in ipv4 a range of the same length. A prefix, /48 to /124, is one node."`
	Interface string `key:"interface" type:"interface" meaning:"SO_BINDTODEVICE. Absent: the escaper's."`
	Uplink    string `key:"uplink" type:"name" ref:"uplink" meaning:"The way off the host. Absent: the escaper's."`
	Weight    uint16 `key:"weight" type:"number" default:"1" min:"0" max:"65535" meaning:"Its share when a policy chooses. 0: only by selection."`

	EIP []netip.Addr `key:"eip" type:"public addresses" meaning:"The address that targets see, where something on the way translates addresses; one, or a list of one of each family. See probe.eip. Not for a range or a prefix."`

	at *place
}

// HappyEyeballs is how a target's addresses are raced.
type HappyEyeballs struct {
	ConnectionAttemptDelay time.Duration `key:"connection_attempt_delay" type:"duration" default:"250ms" min:"10ms" max:"2s" meaning:"How long an attempt goes on alone before the next address is tried beside it."`
}

// UserGroup is a set of users.
type UserGroup struct {
	Name  string `key:"name" type:"name" required:"yes" meaning:"How servers call it."`
	Users []User `key:"users" required:"yes" meaning:"Its users; with an empty list nobody gets in."`
}

// User is one user of a group.
type User struct {
	Name     string `key:"name" type:"name" required:"yes" meaning:"The name to authenticate with; it holds no colon."`
	Password string `key:"password" type:"hash" meaning:"argon2id or bcrypt hash of the password, as wayout hash-password prints it. Required unless from is given; with both, both have to be right."`
	// From holds no network twice; of the users of a group without a password no two have the same one.
	From []netip.Prefix `key:"from" type:"network list" meaning:"Networks and addresses that the client has to be in. Without a password that is all that is asked, and the longest network wins."`
	// EgressPath holds only escapers and nodes that exist, as far as they are known before the start.
	EgressPath selection.Layer `key:"egress_path" alias:"egress_path_id_map" type:"selection map" meaning:"The operator's choice for this user: escaper to node ID, address or index (a number), or a node itself for a direct_float (a map of ip, ipv4, ipv6, id, uplink, expire and labels). A map, or a string that holds it as a JSON object."`
	// Inline is the nodes that EgressPath gives in place of a value, by the name of their direct_float. None of them is in
	// EgressPath; nil when there are none.
	Inline map[string]Inline
	// AllowPath is nil when the key is absent; Allow is the same, ready to match, and nil then too.
	AllowPath []string         `key:"allow_path" type:"path patterns" meaning:"What the user may choose: ESCAPER/ID, with * for any run within a segment. Absent: any; an empty list: nothing."`
	Allow     *selection.Globs // of AllowPath
	Limits    Limits           `key:"limits" meaning:"Bounds of all that the user does, on all servers together."`
}

// Inline is a node that is given in place of the name of one: by an operator's map, or by a publication.
type Inline struct {
	ID     string     // never empty: the address, the IPv4 one when there are both
	V4, V6 netip.Addr // at least one of them is valid
	Uplink string     // empty: the escaper's
	Expire time.Time  // the zero Time: never
	Labels map[string]string
}

// Limits bounds a user or a server. Zeros are no bounds.
type Limits struct {
	Connections int    `key:"connections" type:"number" min:"1" max:"1000000000" meaning:"The most requests, tunnels and associations that are open at once; over it: 429. Absent: any number."`
	Rate        Rate   `key:"rate" type:"rate" meaning:"The most that begin in a time: NUMBER/s, /m or /h; over it: 429. Absent: any number."`
	Bandwidth   uint64 `key:"bandwidth" type:"bandwidth" meaning:"The most bits a second in each direction, of all connections and datagrams together, as 100Mbit/s. Absent: no bound."`
}

// Rate is so many in a time. The zero Rate is no bound.
type Rate struct {
	Count int
	Per   time.Duration
}

// Select is how a server selects when nobody else does.
type Select struct {
	Mode string          // "", "ingress_ip", "port" (index n is for the n-th of Listen) or "map"
	Map  selection.Layer // of the mode map
}

// Server is a front end.
type Server struct {
	Name   string           `key:"name" type:"name" required:"yes" meaning:"Its name in logs and metrics."`
	Type   string           `key:"type" type:"one of" of:"http_proxy socks_proxy mixed_proxy tproxy" required:"yes" meaning:"http_proxy: CONNECT and absolute-form HTTP/1. socks_proxy: SOCKS5, SOCKS4 and SOCKS4a. mixed_proxy: all of these, told apart by the first byte. tproxy: TCP and UDP that the host would forward, taken on its way."`
	Listen []netip.AddrPort `key:"listen" type:"ip:port list" for:"http_proxy socks_proxy mixed_proxy" required:"yes" meaning:"Where it listens: an address or a list. :PORT, or PORT alone, is all addresses of both families ([::]:PORT); port 0 is any free one. LOW-HIGH in the place of PORT is a range of ports. PREFIX:PORT, or [PREFIX]:PORT for IPv6, is every address of a prefix that is the host's own, by one listener."`
	// ListenNets are the prefixes of listen.
	ListenNets          []ListenNet
	Escaper             string        `key:"escaper" type:"name" ref:"escaper" required:"yes" meaning:"What carries its requests out."`
	UserGroup           string        `key:"user_group" type:"name" ref:"user_group" meaning:"Who may use it. Absent: everyone who can connect, and then only loopback addresses may be listened on unless open is on. In a tproxy: users are known by from; whoever is none of them is reset."`
	Open                bool          `key:"open" type:"switch" for:"http_proxy socks_proxy mixed_proxy" default:"off" meaning:"Accept listen addresses other than loopback without a user_group: an open proxy."`
	PathSelectionHeader string        `key:"path_selection_header" alias:"egress_path_selection_header" type:"header name" for:"http_proxy mixed_proxy" meaning:"The request header by which a client chooses a path; removed before the request goes on. Absent: off."`
	ReportEgress        bool          `key:"report_egress" type:"switch" for:"http_proxy mixed_proxy" default:"off" meaning:"Tell the client path and source address, in Proxy-Status and X-Egress-IP."`
	SOCKSExtension      bool          `key:"socks_extension" type:"switch" for:"socks_proxy mixed_proxy" default:"off" meaning:"Accept a selection in the SOCKS5 greeting, by method 0xE9."`
	UsernameParams      bool          `key:"username_params" type:"switch" for:"http_proxy socks_proxy mixed_proxy" default:"off" meaning:"Read parameters behind the user name: BASE-path-ID, -ip-, -session-, -lifetime-, -strict-. Needs a user_group."`
	Select              Select        `key:"select" type:"server selection" meaning:"What is selected when neither operator nor client does. ingress_ip: the address that the client connected to. port: the node whose index is the position of the listener in listen, from 1. Or a map of escapers, as egress_path, without nodes of its own; a tproxy has only that."`
	Interface           []string      `key:"interface" type:"interfaces" for:"tproxy" required:"yes" meaning:"Where the traffic comes in that is taken, one or a list. They need not be there yet."`
	Divert              []Divert      `key:"divert" type:"diverted ports" for:"tproxy" required:"yes" meaning:"What is taken of the traffic for others, by protocol and destination port: tcp/443, udp/1000-2000, tcp/*. What is for the host's own addresses is left alone."`
	Rest                string        `key:"rest" type:"one of" of:"forward drop" for:"tproxy" default:"forward" meaning:"What becomes of other traffic that is to be forwarded from the interfaces. forward: as if wayout were not there. drop: it goes nowhere."`
	Sniff               bool          `key:"sniff" type:"switch" for:"tproxy" default:"off" meaning:"Look for the name that a client calls its destination (TLS and QUIC server name, HTTP Host), for route_upstream and pick_key: host. The original address is dialled all the same."`
	SniffTimeout        time.Duration `key:"sniff_timeout" type:"duration" for:"tproxy" default:"300ms" min:"10ms" max:"10s" meaning:"How long a client that says nothing is waited for. Then its connection goes on without a name, as protocols need it in which the server speaks first."`
	UDPFlows            int           `key:"udp_flows" type:"number" for:"tproxy" default:"16384" min:"1" max:"1048576" meaning:"The most UDP flows at once, a flow being a client's address and port and a destination's. Over it the one that was silent longest ends."`
	Limits              Limits        `key:"limits" meaning:"Bounds of all that the server does, all its users together."`

	ReqHeaderMaxSize  int `key:"req_header_max_size" type:"size" for:"http_proxy mixed_proxy" default:"64KiB" min:"1KiB" max:"1MiB" meaning:"The longest head of a request; over it: 431."`
	ReqHeaderMaxCount int `key:"req_header_max_count" type:"number" for:"http_proxy mixed_proxy" default:"200" min:"8" max:"4096" meaning:"The most header fields in a request; over it: 431."`
	ReqTargetMaxSize  int `key:"req_target_max_size" type:"size" for:"http_proxy mixed_proxy" default:"16KiB" min:"256" max:"1MiB" meaning:"The longest request target (URL)."`
	RspHeaderMaxSize  int `key:"rsp_header_max_size" type:"size" for:"http_proxy mixed_proxy" default:"256KiB" min:"1KiB" max:"4MiB" meaning:"The longest head of a response; over it: 502."`
	RspHeaderMaxCount int `key:"rsp_header_max_count" type:"number" for:"http_proxy mixed_proxy" default:"1000" min:"8" max:"16384" meaning:"The most header fields in a response; over it: 502."`

	PipelineReadIdleTimeout time.Duration `key:"pipeline_read_idle_timeout" type:"duration" for:"http_proxy mixed_proxy" default:"2m" min:"10ms" max:"24h" meaning:"How long a client connection may wait between two requests."`
	ReqHeaderRecvTimeout    time.Duration `key:"req_header_recv_timeout" type:"duration" for:"http_proxy socks_proxy mixed_proxy" default:"30s" min:"10ms" max:"1h" meaning:"The longest from the first byte of a request to the end of its head; with SOCKS, from the connection to the end of the request, the check of a password left out."`
	AuthTimeout             time.Duration `key:"auth_timeout" type:"duration" for:"http_proxy socks_proxy mixed_proxy" default:"10s" min:"10ms" max:"5m" meaning:"The longest that checking a password may take, the wait for its turn included."`
	RspHeaderRecvTimeout    time.Duration `key:"rsp_header_recv_timeout" type:"duration" for:"http_proxy mixed_proxy" default:"5m" min:"10ms" max:"24h" meaning:"The longest from the end of a request to the end of the response's head; over it: 504."`
	BodyStallTimeout        time.Duration `key:"body_stall_timeout" type:"duration" for:"http_proxy mixed_proxy" default:"5m" min:"10ms" max:"24h" meaning:"How long nothing of a body may come, in either direction."`
	SendTimeout             time.Duration `key:"send_timeout" type:"duration" for:"http_proxy socks_proxy mixed_proxy" default:"2m" min:"10ms" max:"24h" meaning:"How long a peer may take nothing of what is sent to it."`
	TunnelIdleTimeout       time.Duration `key:"tunnel_idle_timeout" type:"duration" default:"1h" min:"10ms" max:"30d" meaning:"How long a tunnel may stand still in both directions."`
	UDPIdleTimeout          time.Duration `key:"udp_idle_timeout" type:"duration" for:"socks_proxy mixed_proxy tproxy" default:"60s" min:"1s" max:"1h" meaning:"How long a UDP association, or flow, may carry nothing in both directions."`
}

// ListenNet is a prefix whose every address is listened on, at a port or a range of ports, both ends included.
type ListenNet struct {
	Prefix      netip.Prefix
	First, Last uint16
}

// Divert is what a tproxy takes: destination ports of a protocol, both ends included. 0 and 65535 stand for all of the
// protocol.
type Divert struct {
	TCP         bool // else UDP
	First, Last uint16
}

// Keepalive is the pool of idle upstream connections. A connection is only ever used again for the same path, source
// address, user and destination.
type Keepalive struct {
	Enable     bool          `key:"enable" type:"switch" default:"on" meaning:"Keep them at all."`
	IdleExpire time.Duration `key:"idle_expire" type:"duration" default:"60s" min:"10ms" max:"1h" meaning:"How long one is kept."`
	MaxPerKey  int           `key:"max_per_key" type:"number" default:"32" min:"1" max:"65536" meaning:"The most that are kept for one path, source address, user and destination."`
	Max        int           `key:"max" type:"number" default:"4096" min:"1" max:"1048576" meaning:"The most that are kept in all."`
}

// DefaultHeader is the path_selection_header of the zero configuration.
const DefaultHeader = "X-Egress-Path"

// Default is the configuration of a host without a configuration file: an escaper `out` with a node for each of addrs,
// in order, whose ID is the address, and a mixed_proxy `web` on 127.0.0.1:3128 whose clients choose by X-Egress-Path.
// Addresses that cannot be a node's (invalid, unspecified, multicast, with a zone) and repeated ones are left out.
func Default(addrs []netip.Addr) *Config {
	c := newDecoder("").fresh()
	c.Resolvers = []Resolver{{Name: DefaultResolver, Type: "system"}}
	out := newWithDefaults[Escaper]("direct_fixed")
	out.Name, out.Type, out.Resolver, out.EnablePathSelection = "out", "direct_fixed", DefaultResolver, true
	seen := make(map[netip.Addr]bool, len(addrs))
	for _, a := range addrs {
		a = a.Unmap()
		if badNodeAddr(a) != "" || seen[a] {
			continue
		}
		seen[a] = true
		n := Node{ID: a.String(), Weight: 1}
		if a.Is4() {
			n.IPv4 = a
		} else {
			n.IPv6 = a
		}
		out.Nodes = append(out.Nodes, n)
	}
	web := newWithDefaults[Server]("mixed_proxy")
	web.Name, web.Type, web.Escaper, web.PathSelectionHeader = "web", "mixed_proxy", out.Name, DefaultHeader
	web.Listen = []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 3128)}
	c.Escapers, c.Servers = []Escaper{*out}, []Server{*web}
	return c
}
