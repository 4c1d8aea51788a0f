package router

import (
	"net/netip"

	"wayout/router/config"
	"wayout/router/escaper"
)

// judgeHealth says how an escaper's paths are judged besides by the kernel's
// state. Without a watch over them, for a plan that is only looked at, they are
// not.
func (r *Router) judgeHealth(o *escaper.Options, e *config.Escaper) {
	if r.health == nil {
		return
	}
	o.Health, o.Spill = r.health, e.Spill
	if h := e.Health; h.On {
		o.Passive = &escaper.Passive{Failures: h.Failures, Destinations: h.Destinations, Window: h.Window, Hold: h.Hold}
	}
	if p := e.Probe; p.TCP != "" || p.HTTP != "" {
		o.Probe = &escaper.Probe{
			TCP: p.TCP, HTTP: p.HTTP, Interval: p.Interval, Timeout: p.Timeout, Fall: p.Fall, Rise: p.Rise, EIP: p.EIP,
		}
	}
}

// onHealth tells of paths that connections or probes have changed.
func (r *Router) onHealth(changed []*escaper.Path) {
	r.logChanges(changed)
	r.socket.Changed()
}

// labelEIP is the label of a published node that says what targets see.
const labelEIP = "eip"

// eipOf reads it; nil when there is none.
func eipOf(labels map[string]string) []netip.Addr {
	a, err := netip.ParseAddr(labels[labelEIP])
	if err != nil {
		return nil
	}
	return []netip.Addr{a.Unmap()}
}
