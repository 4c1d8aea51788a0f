package control

import (
	"context"
	"errors"
	"fmt"
	"html/template"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Monitor serves /metrics, /healthz and the dashboard at /.
type Monitor struct {
	srv *http.Server
}

// NewMonitor makes the server. healthy says whether the daemon takes new
// work: /healthz is 200 then and 503 otherwise.
func NewMonitor(c *Collector, paths func() Paths, healthy func() bool) *Monitor {
	reg := prometheus.NewRegistry()
	reg.MustRegister(c, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	page := template.Must(template.New("dashboard").Parse(dashboard))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if !healthy() {
			http.Error(w, "not ready", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
		// A browser that went away is no fault of the daemon's.
		_ = page.Execute(w, paths())
	})
	return &Monitor{srv: &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute}}
}

// Serve answers until Close. It returns nil then.
func (m *Monitor) Serve(l net.Listener) error {
	if err := m.srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("metrics listener: %w", err)
	}
	return nil
}

// Close ends the server.
func (m *Monitor) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := m.srv.Shutdown(ctx); err != nil {
		return errors.Join(err, m.srv.Close())
	}
	return nil
}

// dashboard is the page at /: the paths as the daemon sees them. It is made
// anew by the browser every two seconds and runs no script.
const dashboard = `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="refresh" content="2">
<title>wayout</title>
<style>
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .25rem .75rem; border-bottom: 1px solid #ddd; white-space: nowrap }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.up { color: #17692e } .down, .expired { color: #a4161a } .draining, .probing { color: #8a5a00 }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818 } th, td { border-color: #333 }
  .up { color: #6fcf87 } .down, .expired { color: #ff8a8a } .draining, .probing { color: #ffca6b }
}
</style>
</head>
<body>
<h1>wayout</h1>
<table>
<tr><th>path</th><th>state</th><th>IPv4</th><th>IPv6</th><th>interface</th><th class="n">weight</th>
<th class="n">open</th><th class="n">made</th><th class="n">failed</th><th class="n">bytes in</th><th class="n">bytes out</th><th class="n">guard drops</th></tr>
{{range .Paths}}<tr><td>{{.Path}}</td><td class="{{.State}}">{{.State}}{{with .Reason}}: {{.}}{{end}}</td>
<td>{{with .IPv4}}{{.}}{{end}}</td><td>{{with .IPv6}}{{.}}{{end}}</td><td>{{with .Interface}}{{.}}{{end}}</td><td class="n">{{.Weight}}</td>
<td class="n">{{.Connections.Open}}</td><td class="n">{{.Connections.Made}}</td><td class="n">{{.Connections.Failed}}</td>
<td class="n">{{.Bytes.In}}</td><td class="n">{{.Bytes.Out}}</td><td class="n">{{.GuardDrops}}</td></tr>
{{end}}</table>
</body>
</html>
`
