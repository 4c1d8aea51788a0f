// Package config reads the configuration file: YAML to typed values, and every mistake of a file at once, each with the
// line of the key or value that is wrong.
//
// The structs of this package are the one table of what can be configured. Their tags name each key, its type, unit,
// default and meaning; the decoder reads a file by them and Reference prints them. A key is added by adding a field.
//
//	key       the key in the file; a field without one is not read from it
//	alias     another key with the same meaning
//	type      the type word, see kinds; absent for structs (a map) and slices of structs (a list of maps)
//	of, later the words of a "one of" type; later: those that this version does not support yet
//	ref       the section whose names are the possible values
//	min, max  bounds of numbers, sizes and durations
//	default   in the words of the file; absent: the zero value
//	required  "yes": the key has to be there
//	unit      what a bare number counts
//	meaning   one sentence
//
// A blank field with a tag `later` holds keys that are known and not supported by this version.
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

	_ struct{} `later:"pin"`
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
	Type string `key:"type" type:"one of" of:"system" later:"dns" required:"yes" meaning:"system: servers and search list of resolv.conf and /etc/hosts, asked by wayout's own sockets, cached."`

	_ struct{} `later:"server bind hosts"`
}

// Uplink is a way off the host.
type Uplink struct {
	Name            string     `key:"name" type:"name" required:"yes" meaning:"How escapers and nodes call it."`
	Interface       string     `key:"interface" type:"interface" required:"yes" meaning:"The network interface."`
	Gateway4        netip.Addr `key:"gateway4" type:"ipv4" meaning:"Next hop for IPv4. Absent: on-link only."`
	Gateway6        netip.Addr `key:"gateway6" type:"ipv6" meaning:"Next hop for IPv6. Absent: on-link only."`
	ManageAddresses bool       `key:"manage_addresses" type:"switch" default:"off" meaning:"Put missing node addresses on the interface (/32 and /128, noprefixroute)."`
}

// Escaper carries requests out by one of its nodes.
type Escaper struct {
	Name string `key:"name" type:"name" required:"yes" meaning:"How servers and selections call it; the first part of its paths' names."`
	Type string `key:"type" type:"one of" of:"direct_fixed" later:"direct_float route_select route_mapping route_failover route_upstream route_client proxy_http proxy_https proxy_socks5 proxy_float" required:"yes" meaning:"direct_fixed: nodes are addresses and interfaces of this host."`
	// Resolver is never empty: DefaultResolver when the file names none.
	Resolver            string           `key:"resolver" type:"name" ref:"resolver" meaning:"Who resolves target names. Absent: one of type system."`
	EnablePathSelection bool             `key:"enable_path_selection" type:"switch" default:"off" meaning:"Whether clients may choose a node. off: a request in which a client chooses one is refused."`
	PickPolicy          selection.Policy `key:"pick_policy" type:"pick policy" of:"random serial round_robin rendezvous least_conn" later:"jump ketama" default:"random" meaning:"How a node is chosen when nothing selects one."`
	PickKey             string           `key:"pick_key" type:"one of" of:"client_ip user host" default:"client_ip" meaning:"What the hashing policies hash."`
	StrictIndex         bool             `key:"index" type:"index" of:"wrap strict" default:"wrap" meaning:"An index above the number of nodes wraps (and 0 is the last), or is refused."`
	Filter              Filter           `key:"egress_network_filter" meaning:"Which addresses may be dialled; the longest prefix wins, deny on a tie."`

	// Nodes is what nodes and bind_ip say, ranges spelled out, each node with the interface and the uplink that it
	// uses. An escaper with neither and an interface has one node, without an address, named like the interface.
	Nodes []Node `key:"nodes" type:"list of nodes" meaning:"The egress paths, in the order of their indexes."`
	// BindIP is what bind_ip says, ranges spelled out. Its nodes are in Nodes.
	BindIP    []netip.Addr `key:"bind_ip" type:"addresses" meaning:"Shorthand for nodes: one per address, in order, whose ID is the address. FIRST-LAST is a range."`
	Interface string       `key:"interface" type:"interface" meaning:"SO_BINDTODEVICE for nodes that name no interface; alone, it makes one node without an address."`
	Uplink    string       `key:"uplink" type:"name" ref:"uplink" meaning:"The uplink of nodes that name none. Absent: the host's main routing."`

	ConnectTimeout time.Duration `key:"connect_timeout" type:"duration" default:"10s" min:"10ms" max:"10m" meaning:"The longest that connecting to a target may take, all attempts together; over it: 504."`
	HappyEyeballs  HappyEyeballs `key:"happy_eyeballs" meaning:"Racing a target's addresses (RFC 8305)."`

	_ struct{} `later:"cache next resolve_strategy hosts neighbour probe spill"`
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
	IPv4, IPv6 netip.Addr // the zero Addr: none
	Interface  string     // to bind to; empty: none
	Uplink     string     // empty: the host's main routing
	Weight     uint16
}

// nodeSpec is a node as the file has it, before ranges are spelled out.
type nodeSpec struct {
	ID        string `key:"id" type:"name" meaning:"Its name in selections. Absent: its address, the IPv4 one when it has both. With a range, each node is called ID/ADDRESS, or ADDRESS when there is no ID."`
	IPv4      span   `key:"ipv4" type:"ipv4 or range" meaning:"Source address for IPv4 targets. FIRST-LAST is a range: one node per address."`
	IPv6      span   `key:"ipv6" type:"ipv6 or range" meaning:"Source address for IPv6 targets. Beside a range in ipv4 a range of the same length."`
	Interface string `key:"interface" type:"interface" meaning:"SO_BINDTODEVICE. Absent: the escaper's."`
	Uplink    string `key:"uplink" type:"name" ref:"uplink" meaning:"The way off the host. Absent: the escaper's."`
	Weight    uint16 `key:"weight" type:"number" default:"1" min:"0" max:"65535" meaning:"Its share when a policy chooses. 0: only by selection."`

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
	Password string `key:"password" type:"hash" required:"yes" meaning:"argon2id or bcrypt hash of the password, as wayout hash-password prints it."`
	// EgressPath holds only escapers and nodes that exist.
	EgressPath selection.Layer `key:"egress_path" alias:"egress_path_id_map" type:"selection map" meaning:"The operator's choice for this user: escaper to node ID, address or index (a number). A map, or a string that holds it as a JSON object."`
	// AllowPath is nil when the key is absent; Allow is the same, ready to match, and nil then too.
	AllowPath []string         `key:"allow_path" type:"path patterns" meaning:"What the user may choose: ESCAPER/ID, with * for any run within a segment. Absent: any; an empty list: nothing."`
	Allow     *selection.Globs // of AllowPath

	_ struct{} `later:"limits from"`
}

// Server is a front end.
type Server struct {
	Name                string           `key:"name" type:"name" required:"yes" meaning:"Its name in logs and metrics."`
	Type                string           `key:"type" type:"one of" of:"http_proxy" later:"socks_proxy mixed_proxy tproxy" required:"yes" meaning:"http_proxy: CONNECT and absolute-form HTTP/1."`
	Listen              []netip.AddrPort `key:"listen" type:"ip:port list" required:"yes" meaning:"Where it listens: an address or a list. :PORT, or PORT alone, is all addresses of both families ([::]:PORT); port 0 is any free one."`
	Escaper             string           `key:"escaper" type:"name" ref:"escaper" required:"yes" meaning:"What carries its requests out."`
	UserGroup           string           `key:"user_group" type:"name" ref:"user_group" meaning:"Who may use it. Absent: everyone who can connect, and then only loopback addresses may be listened on unless open is on."`
	Open                bool             `key:"open" type:"switch" default:"off" meaning:"Accept listen addresses other than loopback without a user_group: an open proxy."`
	PathSelectionHeader string           `key:"path_selection_header" alias:"egress_path_selection_header" type:"header name" meaning:"The request header by which a client chooses a path; removed before the request goes on. Absent: off."`
	ReportEgress        bool             `key:"report_egress" type:"switch" default:"off" meaning:"Tell the client path and source address, in Proxy-Status and X-Egress-IP."`

	ReqHeaderMaxSize  int `key:"req_header_max_size" type:"size" default:"64KiB" min:"1KiB" max:"1MiB" meaning:"The longest head of a request; over it: 431."`
	ReqHeaderMaxCount int `key:"req_header_max_count" type:"number" default:"200" min:"8" max:"4096" meaning:"The most header fields in a request; over it: 431."`
	ReqTargetMaxSize  int `key:"req_target_max_size" type:"size" default:"16KiB" min:"256" max:"1MiB" meaning:"The longest request target (URL)."`
	RspHeaderMaxSize  int `key:"rsp_header_max_size" type:"size" default:"256KiB" min:"1KiB" max:"4MiB" meaning:"The longest head of a response; over it: 502."`
	RspHeaderMaxCount int `key:"rsp_header_max_count" type:"number" default:"1000" min:"8" max:"16384" meaning:"The most header fields in a response; over it: 502."`

	PipelineReadIdleTimeout time.Duration `key:"pipeline_read_idle_timeout" type:"duration" default:"2m" min:"10ms" max:"24h" meaning:"How long a client connection may wait between two requests."`
	ReqHeaderRecvTimeout    time.Duration `key:"req_header_recv_timeout" type:"duration" default:"30s" min:"10ms" max:"1h" meaning:"The longest from the first byte of a request to the end of its head."`
	AuthTimeout             time.Duration `key:"auth_timeout" type:"duration" default:"10s" min:"10ms" max:"5m" meaning:"The longest that checking a password may take, the wait for its turn included."`
	RspHeaderRecvTimeout    time.Duration `key:"rsp_header_recv_timeout" type:"duration" default:"5m" min:"10ms" max:"24h" meaning:"The longest from the end of a request to the end of the response's head; over it: 504."`
	BodyStallTimeout        time.Duration `key:"body_stall_timeout" type:"duration" default:"5m" min:"10ms" max:"24h" meaning:"How long nothing of a body may come, in either direction."`
	SendTimeout             time.Duration `key:"send_timeout" type:"duration" default:"2m" min:"10ms" max:"24h" meaning:"How long a peer may take nothing of what is sent to it."`
	TunnelIdleTimeout       time.Duration `key:"tunnel_idle_timeout" type:"duration" default:"1h" min:"10ms" max:"30d" meaning:"How long a tunnel may stand still in both directions."`

	_ struct{} `later:"username_params socks_extension select divert interface limits"`
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
// in order, whose ID is the address, and an http_proxy `web` on 127.0.0.1:3128 whose clients choose by X-Egress-Path.
// Addresses that cannot be a node's (invalid, unspecified, multicast, with a zone) and repeated ones are left out.
func Default(addrs []netip.Addr) *Config {
	c := newDecoder("").fresh()
	c.Resolvers = []Resolver{{Name: DefaultResolver, Type: "system"}}
	out := newWithDefaults[Escaper]()
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
	web := newWithDefaults[Server]()
	web.Name, web.Type, web.Escaper, web.PathSelectionHeader = "web", "http_proxy", out.Name, DefaultHeader
	web.Listen = []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 3128)}
	c.Escapers, c.Servers = []Escaper{*out}, []Server{*web}
	return c
}
