package main_test

import (
	"strings"
	"testing"

	"wayout/scripts/lab"
)

// TestPrefixNeighboursKilled: what a killed daemon may have left to answer is gone
// with the next one's start, which is told not to.
func TestPrefixNeighboursKilled(t *testing.T) {
	t.Parallel()
	s := newScene(t, true)
	config := func(how, timeout string) string {
		return strings.ReplaceAll(prefixConfig(t, oneUplink, "uplink: isp1", how), "connect_timeout: 20s", "connect_timeout: "+timeout)
	}
	s.start(config("answer", "20s"))
	ask := lab.Ask{Proxy: proxyAt(3129), Target: target6, Header: egress("2001:db8:100:cafe::5")}
	if told := s.ask(ask); told.Status != 200 {
		t.Errorf("answered for: %d %s", told.Status, told.Body)
	}
	if err := s.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	s.write(config("off", "1s"))
	s.run(lab.Program{})
	if err := s.ISP1.ForgetNeighbours("host0"); err != nil {
		t.Fatal(err)
	}
	if told := s.ask(ask); told.Status != 504 {
		t.Errorf("no more: %d %s from %s", told.Status, told.Body, told.Seen.Source)
	}
}
