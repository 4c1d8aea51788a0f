package router

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"

	"wayout/router/control"
	"wayout/router/escaper"
	"wayout/selection"
)

// accessLog writes one JSON line a request, whatever the format of the rest
// of the log is: its readers are programs.
type accessLog struct{ log *slog.Logger }

// newAccessLog writes to w, or nowhere when the level is above info.
func newAccessLog(w io.Writer, level slog.Level) *accessLog {
	if level > slog.LevelInfo {
		return &accessLog{}
	}
	return &accessLog{slog.New(slog.NewJSONHandler(w, nil))}
}

func (a *accessLog) write(r *escaper.Record) {
	if a.log == nil {
		return
	}
	attrs := make([]slog.Attr, 0, 20)
	attrs = append(attrs,
		slog.Time("start", r.Start),
		slog.String("server", r.Server),
		slog.String("client", r.Client.String()),
		slog.String("user", r.User),
		slog.String("method", r.Method),
		slog.String("target", r.Target),
		slog.String("selection", r.Choice.Asked),
		slog.String("selection_source", r.Choice.Source.String()),
		slog.String("path", r.Choice.Path),
	)
	if r.Name != "" {
		attrs = append(attrs, slog.String("name", r.Name))
	}
	if r.Source.IsValid() {
		attrs = append(attrs, slog.String("source_ip", r.Source.Addr().String()), slog.Int("source_port", int(r.Source.Port())))
	}
	attrs = append(attrs,
		slog.Int("status", r.Status),
		slog.Int64("bytes_in", r.BytesIn),
		slog.Int64("bytes_out", r.BytesOut),
		slog.Float64("duration", r.Duration.Seconds()),
		slog.Bool("upstream_reused", r.Reused),
	)
	if r.Method == "UDP" {
		attrs = append(attrs, slog.Int64("dropped", r.Dropped))
	}
	if r.Err != nil {
		attrs = append(attrs, slog.String("error", r.Err.Error()))
	}
	a.log.LogAttrs(context.Background(), slog.LevelInfo, "request", attrs...)
}

// observe makes a front end's hook: it counts each request and logs it.
func observe(a *accessLog, all *control.Counters, server *control.ServerCounters) func(*escaper.Record) {
	return func(r *escaper.Record) {
		server.Request(r.Status)
		if r.Status == http.StatusProxyAuthRequired {
			server.AuthFailure()
		} else if result, decided := decision(r); decided {
			all.Selection(r.Choice.Source, result)
		}
		a.write(r)
	}
}

// decision says what came of choosing a path for a request, and whether it
// came to that at all.
func decision(r *escaper.Record) (result string, decided bool) {
	if errors.Is(r.Err, escaper.ErrNoPath) {
		return selection.Result(selection.ErrDown), true
	}
	result = selection.Result(r.Err)
	return result, r.Choice.Path != "" || result != selection.Result(nil)
}
