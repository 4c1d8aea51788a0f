package relay_test

import (
	"errors"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"wayout/router/relay"
)

// accepting lets an engine accept, and gives a function that dials it.
func accepting(t *testing.T, e *relay.Engine, serve func(*relay.Task, relay.Accepted)) (*relay.Acceptor, func() *net.TCPConn) {
	t.Helper()
	tl, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	l, err := relay.NewListener(tl)
	if err != nil {
		t.Fatal(err)
	}
	a, err := e.Accept(l, serve)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Close() })
	return a, func() *net.TCPConn {
		c, err := net.Dial("tcp4", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c.(*net.TCPConn)
	}
}

// TestTaskTunnel: tasks wait for their clients, some in goroutines of their own,
// and their tunnels take over what the worker watches already.
func TestTaskTunnel(t *testing.T) {
	e := engine(t, relay.Options{}, relay.Tuning{})
	var mu sync.Mutex
	var far []*net.TCPConn
	results := make(chan relay.Result, 100)
	_, dial := accepting(t, e, func(k *relay.Task, c relay.Accepted) {
		if got, err := k.Wait(c.FD, unix.EPOLLIN, time.Time{}); err != nil || got&unix.EPOLLIN == 0 {
			t.Errorf("wait: %x, %v", got, err)
		}
		var b [16]byte
		n, err := unix.Read(c.FD, b[:])
		if err != nil || string(b[:n]) != "hello" {
			t.Errorf("read %q, %v", b[:n], err)
		}
		if c.Remote.Port()%2 == 0 {
			k.Leave()
			time.Sleep(time.Millisecond)
			k.Leave() // has no effect
		}
		near, other := connect(t)
		fd := detach(t, other)
		if got, err := k.Wait(fd, unix.EPOLLOUT, time.Now().Add(patience)); err != nil || got&unix.EPOLLOUT == 0 {
			t.Errorf("wait: %x, %v", got, err)
		}
		mu.Lock()
		far = append(far, near)
		mu.Unlock()
		if _, err := e.Start(relay.Spec{
			A: c.FD, B: fd, ToB: b[:n], Task: k, Prompt: c.Remote.Port()%3 == 0,
			Done: func(r relay.Result) { results <- r },
		}); err != nil {
			t.Error(err)
		}
	})
	const n = 50
	var clients []*net.TCPConn
	for range n {
		clients = append(clients, dial())
	}
	for _, c := range clients {
		send(t, c, "hello")
	}
	if !within(func() bool { mu.Lock(); defer mu.Unlock(); return len(far) == n }) {
		t.Fatal("tunnels are missing")
	}
	for _, f := range far {
		expect(t, f, "hello")
		send(t, f, "there")
	}
	for _, c := range clients {
		expect(t, c, "there")
		_ = c.CloseWrite()
	}
	for _, f := range far {
		expectEOF(t, f)
		_ = f.Close()
	}
	for range n {
		if r := <-results; r.Cause != nil || r.AToB != 5 || r.BToA != 5 {
			t.Errorf("%+v", r)
		}
	}
}

// TestTaskWaits: how a wait ends that no event ends.
func TestTaskWaits(t *testing.T) {
	e := engine(t, relay.Options{Tick: 5 * time.Millisecond}, relay.Tuning{})
	tasks, ends := make(chan *relay.Task, 1), make(chan error, 3)
	enough := errors.New("enough")
	_, dial := accepting(t, e, func(k *relay.Task, c relay.Accepted) {
		defer func() { _ = unix.Close(c.FD) }()
		began := time.Now()
		_, err := k.Wait(c.FD, unix.EPOLLIN, began.Add(50*time.Millisecond))
		if took := time.Since(began); took < 50*time.Millisecond {
			t.Errorf("waited %v", took)
		}
		ends <- err
		tasks <- k
		_, err = k.Wait(c.FD, unix.EPOLLIN, time.Time{})
		ends <- err
		k.Spare()
		tasks <- k
		_, err = k.Wait(c.FD, unix.EPOLLIN, time.Time{})
		ends <- err
	})
	dial()
	if err := <-ends; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	(<-tasks).Kill(enough)
	if err := <-ends; !errors.Is(err, enough) {
		t.Errorf("got %v", err)
	}
	<-tasks
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	if err := <-ends; !errors.Is(err, relay.ErrClosed) {
		t.Errorf("got %v", err)
	}
}

// TestAcceptFails: a worker that cannot accept stops until it is told to go on.
func TestAcceptFails(t *testing.T) {
	e := engine(t, relay.Options{Workers: 1}, relay.Tuning{})
	served := make(chan int, 1)
	a, dial := accepting(t, e, func(_ *relay.Task, c relay.Accepted) { served <- c.FD })
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	dial()
	_ = unix.Close(<-served)
	tl, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer tl.Close()
	client, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(client) }()
	free, err := unix.Dup(0)
	if err != nil {
		t.Fatal(err)
	}
	_ = unix.Close(free)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(free), Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	addr := a.Addr().(*net.TCPAddr)
	if err := unix.Connect(client, &unix.SockaddrInet4{Port: addr.Port, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Error(err)
	}
	select {
	case err = <-a.Errors():
	case <-time.After(patience):
		err = nil
	}
	if e := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); e != nil {
		t.Fatal(e)
	}
	if !errors.Is(err, unix.EMFILE) {
		t.Errorf("got %v", err)
	}
	select {
	case <-served:
		t.Error("accepted while it was stopped")
	case <-time.After(20 * time.Millisecond):
	}
	if err := a.Resume(); err != nil {
		t.Fatal(err)
	}
	select {
	case fd := <-served:
		_ = unix.Close(fd)
	case <-time.After(patience):
		t.Error("it does not go on")
	}
}
