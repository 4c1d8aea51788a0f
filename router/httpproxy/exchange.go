package httpproxy

import (
	"bytes"
	"errors"
	"fmt"
	"time"

	"wayout/router/auth"
	"wayout/router/escaper"
	"wayout/selection"
)

// An exchange is one request with its response. Exchanges are used again, for
// any connection of the server: what they hold between two requests is
// capacity, and the target of the last one.
type exchange struct {
	s *Server
	c *conn

	head  head // of the request
	body  body // of the request
	early []byte
	rec   escaper.Record
	req   *escaper.Request // new for each request: the door may hold on to it

	user    *auth.User // nil: nobody in particular
	counted counted

	// What the head says, for when the client's buffer has moved on.
	authority []byte // of the target; refers to the head
	path      []byte // origin-form of the target; refers to the head
	wantsMore bool   // the client lets its connection be kept
	oldClient bool   // HTTP/1.0
	headOnly  bool   // HEAD
	expects   bool
	upgrades  bool

	reqHead []byte // the request head as it goes to the origin; its buffer is lent
	conn    *escaper.Conn
	up      reader
	upw     writer
	res     head
	resBody body
	upload  upload

	// The last target, so that the next request to it parses nothing.
	lastAuthority []byte
	lastTarget    escaper.Target
	lastText      string
	lastNoPort    bool // it named no port, and got http's
}

func (s *Server) newExchange(c *conn) *exchange {
	x, ok := s.exchanges.Get().(*exchange)
	if !ok {
		x = &exchange{}
		x.up.pool = &s.buffers
		x.upw.limit = s.o.Timeouts.Write
	}
	x.s, x.c = s, c
	x.up.dead, x.upw.dead = &c.dead, &c.dead
	x.rec = escaper.Record{Start: time.Now(), Server: s.o.Name, Client: c.client}
	return x
}

// maxFields is the number of fields that an exchange keeps room for.
const maxFields = 64

// free gives the exchange back, without anything of its request.
func (x *exchange) free() {
	x.counted.end(x.s)
	x.up.drop()
	x.dropHead()
	if x.c.out.out != nil {
		x.s.buffers.put(x.c.out.out)
		x.c.out.out = nil
	}
	for _, h := range []*head{&x.head, &x.res, &x.body.chunks.trailer, &x.resBody.chunks.trailer} {
		if cap(h.fields) > maxFields {
			h.fields = nil
		}
		h.reset(nil)
	}
	x.c, x.req, x.conn, x.user = nil, nil, nil, nil
	x.early, x.authority, x.path = nil, nil, nil
	x.body.in, x.resBody.in = nil, nil
	x.body.payload, x.resBody.payload = 0, 0
	x.body.done = false
	x.up.use(nil, nil)
	x.upw.use(nil, nil)
	x.upw.out = nil
	x.up.dead, x.upw.dead = nil, nil
	x.rec = escaper.Record{}
	x.upload = upload{}
	x.wantsMore, x.oldClient, x.headOnly, x.expects, x.upgrades = false, false, false, false, false
	x.s.exchanges.Put(x)
}

func (x *exchange) dropHead() {
	if x.reqHead != nil {
		x.s.buffers.put(x.reqHead)
		x.reqHead = nil
	}
}

// run serves one request, from its first byte to the end of its response.
func (x *exchange) run() outcome {
	n, err := x.c.readHead()
	if err == nil {
		b := x.c.in.unread()[:n]
		x.c.in.r += n
		err = x.head.parseRequest(b, &x.s.request)
	}
	if err != nil {
		return x.refuseHead(err)
	}
	x.rec.Method = methodText(x.head.method)
	x.oldClient = x.head.minor == 0
	x.wantsMore = !x.head.close && (!x.oldClient || x.head.keepAlive)
	x.headOnly = string(x.head.method) == "HEAD"
	connect := x.head.isConnect()
	if err := x.readTarget(connect); err != nil {
		return x.refuse(err)
	}
	x.startBody()
	early, bodyErr := x.body.ready()
	x.early = early
	if bodyErr != nil {
		return x.refuse(bodyErr)
	}
	if err := x.admit(); err != nil {
		return x.refuse(err)
	}
	x.req = &escaper.Request{
		Server: x.s.o.Name, Escaper: x.s.o.Escaper,
		Client: x.c.client, Local: x.c.local,
		Target: x.lastTarget,
	}
	if x.s.o.ServerSelection != nil {
		x.req.Selection.Server = x.s.o.ServerSelection(x.c.local)
	}
	if err := x.authenticate(); err != nil {
		return x.refuse(err)
	}
	if err := x.readSelection(); err != nil {
		return x.refuse(err)
	}
	if err := x.count(); err != nil {
		return x.refuse(err)
	}
	if connect {
		return x.connect()
	}
	return x.forward()
}

// readTarget finds out where the request goes.
func (x *exchange) readTarget(connect bool) error {
	x.authority, x.path = x.head.target, nil
	if !connect {
		var err error
		if x.authority, x.path, err = splitAbsolute(x.head.target); err != nil {
			return err
		}
	}
	if x.lastText == "" || !bytes.Equal(x.authority, x.lastAuthority) || connect && x.lastNoPort {
		if err := x.parseTarget(connect); err != nil {
			return err
		}
	}
	x.rec.Target = x.lastText
	return x.head.checkHost(x.authority)
}

const defaultPort = 80

func (x *exchange) parseTarget(connect bool) error {
	x.lastText = ""
	var a authority
	if err := a.parse(x.authority, connect); err != nil {
		return err
	}
	t := escaper.Target{Host: string(a.name), Addr: a.addr, Port: a.port}
	x.lastNoPort = t.Port == 0
	if x.lastNoPort {
		t.Port = defaultPort
	}
	x.lastAuthority = append(x.lastAuthority[:0], x.authority...)
	x.lastTarget, x.lastText = t, t.String()
	return nil
}

func (x *exchange) startBody() {
	frame := frameNone
	switch {
	case x.head.chunked:
		frame = frameChunked
	case x.head.length > 0:
		frame = frameSized
	}
	x.body.start(&x.c.in, frame, x.head.length, &x.s.request)
	// Without a body there is nothing to ask about, and HTTP/1.0 has no
	// interim answers (RFC 9110, section 10.1.1).
	x.expects = x.head.expect && frame != frameNone && !x.oldClient
}

// admit says whether there is room for the request. It comes before the
// credentials, because a password that has to be hashed takes memory too.
func (x *exchange) admit() error {
	if x.s.o.Admit == nil {
		return nil
	}
	if err := x.s.o.Admit(); err != nil {
		return fmt.Errorf("%w: %w", errNoRoom, err)
	}
	return nil
}

// errNoRoom: the daemon takes no new work.
var errNoRoom = errors.New("no room for this request")

// readSelection reads the path selection header, all copies of it.
func (x *exchange) readSelection() error {
	if x.head.selections == 0 {
		return nil
	}
	x.req.Selection.ClientSource = selection.SourceHeader
	var value []byte
	seen := false
	for i := range x.head.fields {
		if x.head.fields[i].kind != kindSelection {
			continue
		}
		v := x.head.value(i)
		if seen && !bytes.Equal(v, value) {
			x.rec.Choice = escaper.Choice{Source: selection.SourceHeader, Asked: clip(string(value), maxAsked)}
			return selection.Refuse(selection.ErrMalformed, "copies of %s differ", x.s.o.SelectionHeader)
		}
		value, seen = v, true
	}
	text := string(value) // the layer refers to it
	l, err := selection.ParseHeader(text, x.s.o.Escaper)
	if err != nil {
		x.rec.Choice = escaper.Choice{Source: selection.SourceHeader, Asked: clip(text, maxAsked)}
		return fmt.Errorf("%s: %w", x.s.o.SelectionHeader, err)
	}
	x.req.Selection.Client = l
	return nil
}

// maxAsked is how much of a selection that cannot be read goes into the
// record.
const maxAsked = 256

func clip(s string, n int) string {
	if len(s) > n {
		return s[:n]
	}
	return s
}

// methodText gives the method as a string, without a copy for the usual ones.
func methodText(m []byte) string {
	switch string(m) {
	case "GET":
		return "GET"
	case "HEAD":
		return "HEAD"
	case "POST":
		return "POST"
	case "PUT":
		return "PUT"
	case "DELETE":
		return "DELETE"
	case "OPTIONS":
		return "OPTIONS"
	case "PATCH":
		return "PATCH"
	case "TRACE":
		return "TRACE"
	case "CONNECT":
		return "CONNECT"
	}
	return string(m)
}

// idempotent reports whether a request with this method may be sent twice (RFC
// 9110, section 9.2.2).
func idempotent(method string) bool {
	switch method {
	case "GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE":
		return true
	}
	return false
}

// out lends the client's writer a buffer of at least n bytes and returns it,
// empty.
func (x *exchange) out(n int) *writer {
	w := &x.c.out
	if cap(w.out) < n {
		if w.out != nil {
			x.s.buffers.put(w.out)
		}
		w.out = x.s.buffers.get(n)
	}
	w.out = w.out[:0]
	return w
}

// observe reports the request: status is what the client got.
func (x *exchange) observe(status int, err error) {
	x.rec.Status, x.rec.Err = status, err
	x.rec.Duration = time.Since(x.rec.Start)
	x.rec.BytesOut = x.body.payload
	x.rec.BytesIn = x.resBody.payload
	x.s.observe(&x.rec)
}
