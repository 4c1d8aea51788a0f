package main

import (
	"bytes"
	"fmt"
	"text/template"
)

// How the origin is reached through a peer.
const (
	viaConnect = "connect" // CONNECT
	viaSOCKS   = "socks5"
	viaHTTP    = "http"   // absolute-form GET
	viaRelay   = "relay"  // a port that leads to the origin, whatever is asked
	viaDirect  = "direct" // no proxy
	viaDivert  = "divert" // no proxy that the client knows of: the host takes the connection
)

// A peer is a proxy and how it is made comparable: one source address that it
// has to leave by, or for each request the one that the request names; no
// cache, no access log, as many connections as asked for. All else is as its
// authors left it.
type peer struct {
	name    string
	program string   // looked for in PATH and in the directories for daemons
	version []string // arguments that make it tell its version
	args    []string // templates over vars
	file    string   // name of its configuration file, "" when it has none
	config  string   // template over vars
	owner   string   // user that has to be able to write its directory
	tunnel  string   // how it makes tunnels, "" when it makes none
	forward bool     // it takes absolute-form requests
	both    bool     // it makes tunnels by SOCKS5 too, on socksPort
	header  string   // of each request: %s is the source to leave by
	sources bool     // it leaves by all of them, as header or its own policy says
	after   []string // templates: arguments with which its program takes back what it leaves when it ends
	note    string
}

// vars is what the templates see.
type vars struct {
	Dir        string // its own directory
	Listen     string // address to listen on
	Port       int
	SOCKSPort  int      // of those that have one for SOCKS5 alone
	Source     string   // to leave by
	Sources    []string // when each request names its own
	Origin     string   // address and port, for relays
	Inner      string   // interface on the clients' side
	OriginPort int
	Files      int // limit of open files
	Conns      int // connections that have to be possible
	CPUs       int
}

func (v *vars) fill(text string) (string, error) {
	t, err := template.New("").Option("missingkey=error").Parse(text)
	if err != nil {
		return "", err
	}
	var b bytes.Buffer
	if err := t.Execute(&b, v); err != nil {
		return "", fmt.Errorf("template: %w", err)
	}
	return b.String(), nil
}

func (v *vars) fillAll(texts []string) ([]string, error) {
	all := make([]string, len(texts))
	for i, t := range texts {
		var err error
		if all[i], err = v.fill(t); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// via gives how a job reaches the origin through the peer, "" when it cannot.
func (p *peer) via(m *mode) string {
	switch {
	case p.tunnel == viaDirect && m.fresh:
		return ""
	case p.tunnel == viaRelay && m.name == "ports": // it has one destination
		return ""
	case p.tunnel == viaDivert && (m.socks || m.job.Kind == "http" || m.name == "ports"): // nobody asks it anything
		return ""
	case p.tunnel == viaDirect || p.tunnel == viaRelay || p.tunnel == viaDivert:
		return p.tunnel
	case m.socks && (p.both || p.tunnel == viaSOCKS):
		return viaSOCKS
	case m.socks:
		return ""
	case m.job.Kind == "http" && p.forward:
		return viaHTTP
	case m.job.Kind == "http":
		return ""
	}
	return p.tunnel
}

// The nearer a peer is to what wayout does, the higher it stands.
func allPeers() []*peer {
	return []*peer{
		{name: "direct", tunnel: viaDirect, note: "no proxy: the host forwards packets"},
		{
			name: "wayout", program: ourProgram, version: []string{"version"}, tunnel: viaConnect, forward: true, both: true,
			args: serveArgs(), file: "wayout.yaml", config: wayoutBase + wayoutSOCKS + wayoutWeb,
			header: "X-Egress-Path: %s", sources: true,
			note: "each request names one of 16 sources, by SOCKS5 the policy does; counters and guard are on",
		},
		{
			name: "wayout-tproxy", program: ourProgram, version: []string{"version"}, tunnel: viaDivert,
			args: serveArgs(), file: "wayout.yaml", config: wayoutBase + wayoutDivert, sources: true,
			after: []string{"clean", "--config", "{{.Dir}}/wayout.yaml"},
			note:  "connections that the host would forward are diverted; the policy takes one of 16 sources",
		},
		{
			name: "wayout-other", program: otherProgram, version: []string{"version"}, tunnel: viaConnect, forward: true,
			args: serveArgs(), file: "wayout.yaml", config: wayoutBase + wayoutWeb, header: "X-Egress-Path: %s", sources: true,
			note: "another build of wayout, see -other",
		},
		{
			name: "squid", program: "squid", version: []string{"-v"}, tunnel: viaConnect, forward: true,
			args: []string{"-N", "-f", "{{.Dir}}/squid.conf"}, file: "squid.conf", config: squidConfig, owner: "proxy",
			note: "one process, without a cache",
		},
		{
			name: "tinyproxy", program: "tinyproxy", version: []string{"-v"}, tunnel: viaConnect, forward: true,
			args: []string{"-d", "-c", "{{.Dir}}/tinyproxy.conf"}, file: "tinyproxy.conf", config: tinyproxyConfig, owner: "nobody",
			note: "a thread for each connection",
		},
		{
			name: "dante", program: "danted", version: []string{"-v"}, tunnel: viaSOCKS,
			args: []string{"-f", "{{.Dir}}/danted.conf", "-p", "{{.Dir}}/danted.pid"}, file: "danted.conf", config: danteConfig,
			note: "SOCKS5",
		},
		{
			name: "microsocks", program: "microsocks", tunnel: viaSOCKS,
			args: []string{"-i", "{{.Listen}}", "-p", "{{.Port}}", "-b", "{{.Source}}"},
			note: "SOCKS5; a thread for each connection; it writes a line for each",
		},
		{
			name: "haproxy-http", program: "haproxy", version: []string{"-v"}, forward: true,
			args: []string{"-db", "-f", "{{.Dir}}/haproxy.cfg"}, file: "haproxy.cfg", config: haproxyBase + haproxyHTTP,
			note: "forwards only: it ends no CONNECT",
		},
		{
			name: "haproxy-tcp", program: "haproxy", version: []string{"-v"}, tunnel: viaRelay,
			args: []string{"-db", "-f", "{{.Dir}}/haproxy.cfg"}, file: "haproxy.cfg", config: haproxyBase + haproxyTCP,
			note: "a floor: relays to one destination, reads no request",
		},
		{
			name: "nginx-stream", program: "nginx", version: []string{"-v"}, tunnel: viaRelay,
			args: []string{"-p", "{{.Dir}}", "-c", "{{.Dir}}/nginx.conf"}, file: "nginx.conf", config: nginxConfig,
			note: "a floor: relays to one destination, reads no request; a worker for each core",
		},
	}
}

// Programs that are named by a flag.
const (
	ourProgram   = "-wayout"
	otherProgram = "-other"
)

func serveArgs() []string { return []string{"serve", "--config", "{{.Dir}}/wayout.yaml"} }

const wayoutBase = `control: {socket: "{{.Dir}}/control.sock"}
log: {level: warn}
escaper:
  - name: out
    type: direct_fixed
    enable_path_selection: true
    bind_ip: [{{range $i, $a := .Sources}}{{if $i}}, {{end}}"{{$a}}"{{end}}]
server:
`

const wayoutSOCKS = `  - {name: socks, type: socks_proxy, listen: "{{.Listen}}:{{.SOCKSPort}}", open: true, escaper: out}
`

const wayoutWeb = `  - {name: web, type: http_proxy, listen: "{{.Listen}}:{{.Port}}", open: true, escaper: out, path_selection_header: X-Egress-Path}
`

const wayoutDivert = `  - {name: lan, type: tproxy, interface: {{.Inner}}, divert: ["tcp/{{.OriginPort}}"], escaper: out}
`

const squidConfig = `http_port {{.Listen}}:{{.Port}}
http_access allow all
tcp_outgoing_address {{.Source}}
max_filedescriptors {{.Files}}
cache deny all
access_log none
cache_store_log none
cache_log {{.Dir}}/cache.log
pid_filename {{.Dir}}/squid.pid
coredump_dir {{.Dir}}
dns_nameservers 127.0.0.1
pinger_enable off
via off
forwarded_for delete
shutdown_lifetime 0 seconds
`

const tinyproxyConfig = `User nobody
Listen {{.Listen}}
Port {{.Port}}
Bind {{.Source}}
MaxClients {{.Conns}}
Timeout 600
LogLevel Critical
LogFile "{{.Dir}}/tinyproxy.log"
DisableViaHeader Yes
`

const danteConfig = `internal: {{.Listen}} port = {{.Port}}
external: {{.Source}}
logoutput: {{.Dir}}/dante.log
user.privileged: root
user.unprivileged: nobody
clientmethod: none
socksmethod: none
client pass { from: 0/0 to: 0/0 log: error }
socks pass { from: 0/0 to: 0/0 log: error }
`

const haproxyBase = `global
  maxconn {{.Conns}}
defaults
  timeout connect 10s
  timeout client 10m
  timeout server 10m
`

const haproxyHTTP = `frontend in
  mode http
  bind {{.Listen}}:{{.Port}}
  http-request set-dst url_ip
  http-request set-dst-port url_port
  http-request set-uri %[path]
  default_backend out
backend out
  mode http
  http-reuse safe
  source {{.Source}}
  server anywhere 0.0.0.0:0
`

const haproxyTCP = `listen relay
  mode tcp
  option splice-auto
  bind {{.Listen}}:{{.Port}}
  server origin {{.Origin}} source {{.Source}}
`

const nginxConfig = `load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off;
user www-data;
pid {{.Dir}}/nginx.pid;
error_log {{.Dir}}/error.log crit;
worker_processes {{.CPUs}};
worker_rlimit_nofile {{.Files}};
events { worker_connections {{.Files}}; }
stream {
  server { listen {{.Listen}}:{{.Port}} backlog=4096; proxy_bind {{.Source}}; proxy_timeout 10m; proxy_pass {{.Origin}}; }
}
`
