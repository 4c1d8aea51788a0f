package rig

import "strings"

// Malformed is a request that an HTTP proxy refuses, and after which it closes.
type Malformed struct {
	In     string // ORIGIN stands for the origin's address and port; its path is /bad
	Status int
	Words  string // in the answer's text
}

// Of requests with a fault in the body the head may have gone on.
const (
	line    = "GET http://ORIGIN/bad HTTP/1.1\r\n"
	host    = "Host: ORIGIN\r\n"
	get     = line + host
	post    = "POST http://ORIGIN/bad HTTP/1.1\r\n" + host
	chunked = post + "Transfer-Encoding: chunked\r\n\r\n"
)

// IsBody says whether its fault may be in the body.
func (m Malformed) IsBody() bool { return strings.HasPrefix(m.In, chunked) }

// MalformedRequests are the shapes, by name, for a proxy that takes heads of 8 KiB,
// 32 fields and targets of 2 KiB.
func MalformedRequests() map[string]Malformed {
	long := strings.Repeat("x", 9<<10)
	return map[string]Malformed{
		// Framing that two readers see two ways.
		"length before coding":        {post + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "both"},
		"coding before length":        {post + "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n", 400, "both"},
		"lengths that differ":         {post + "Content-Length: 0\r\nContent-Length: 44\r\n\r\n", 400, "more than one Content-Length"},
		"equal lengths":               {post + "Content-Length: 2\r\nContent-Length: 2\r\n\r\nhi", 400, "more than one Content-Length"},
		"equal lengths in one field":  {post + "Content-Length: 2, 2\r\n\r\nhi", 400, "Content-Length"},
		"signed length":               {post + "Content-Length: +2\r\n\r\nhi", 400, "Content-Length"},
		"negative length":             {post + "Content-Length: -2\r\n\r\n", 400, "Content-Length"},
		"hexadecimal length":          {post + "Content-Length: 0x2\r\n\r\nhi", 400, "Content-Length"},
		"length of nothing":           {post + "Content-Length: \r\n\r\n", 400, "Content-Length"},
		"length with a space":         {post + "Content-Length: 1 0\r\n\r\n", 400, "Content-Length"},
		"length over 64 bits":         {post + "Content-Length: 18446744073709551616\r\n\r\n", 400, "Content-Length"},
		"length over 63 bits":         {post + "Content-Length: 9223372036854775808\r\n\r\n", 400, "Content-Length"},
		"coding of two":               {post + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501, "chunked"},
		"coding after chunked":        {post + "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", 501, "chunked"},
		"coding with another's name":  {post + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501, "chunked"},
		"coding in quotes":            {post + "Transfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n", 501, "chunked"},
		"coding twice":                {post + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "Transfer-Encoding"},
		"coding in HTTP/1.0":          {"POST http://ORIGIN/bad HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "HTTP/1.0"},
		"coding in a folded line":     {post + "Transfer-Encoding: chunked\r\n ,identity\r\n\r\n0\r\n\r\n", 400, "folded"},
		"Connection: Content-Length":  {post + "Content-Length: 2\r\nConnection: Content-Length\r\n\r\nhi", 400, "Connection"},
		"Connection: Host":            {get + "Connection: keep-alive, host\r\n\r\n", 400, "Connection"},
		"CONNECT with a body":         {"CONNECT ORIGIN HTTP/1.1\r\n" + host + "Content-Length: 2\r\n\r\nhi", 400, "CONNECT with a body"},
		"CONNECT with a chunked body": {"CONNECT ORIGIN HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "CONNECT with a body"},

		// Lines.
		"request line ends in LF":     {"GET http://ORIGIN/bad HTTP/1.1\n" + host + "\r\n", 400, "LF"},
		"field ends in LF":            {get + "A: b\n\r\n", 400, "LF"},
		"head ends in LF":             {get + "\n", 400, "LF"},
		"LF hides a field":            {get + "A: b\nTransfer-Encoding: chunked\r\n\r\n", 400, "LF"},
		"CR within a value":           {get + "A: b\rContent-Length: 3\r\n\r\n", 400, "control"},
		"CR before CRLF":              {get + "A: b\r\r\n\r\n", 400, "control"},
		"obs-fold by a space":         {get + "A: b\r\n c\r\n\r\n", 400, "folded"},
		"obs-fold by a tab":           {get + "A: b\r\n\tc\r\n\r\n", 400, "folded"},
		"fold before the first field": {line + " Host: ORIGIN\r\n\r\n", 400, "folded"},
		"space before the colon":      {get + "A : b\r\n\r\n", 400, "white space"},
		"tab before the colon":        {get + "A\t: b\r\n\r\n", 400, "white space"},
		"space in the length's name":  {post + "Content-Length : 2\r\n\r\nhi", 400, "white space"},
		"no colon":                    {get + "Nonsense\r\n\r\n", 400, "field"},
		"no name":                     {get + ": b\r\n\r\n", 400, "name"},
		"name that is no token":       {get + "A{}: b\r\n\r\n", 400, "name"},
		"name above ASCII":            {get + "\xc5\xbfa: b\r\n\r\n", 400, "name"},
		"NUL in a value":              {get + "A: b\x00\r\n\r\n", 400, "control"},
		"NUL in a name":               {get + "A\x00: b\r\n\r\n", 400, "control"},
		"DEL in a value":              {get + "A: b\x7f\r\n\r\n", 400, "control"},
		"escape in a value":           {get + "A: \x1b[2J\r\n\r\n", 400, "control"},
		"control in the target":       {"GET http://ORIGIN/bad\x01 HTTP/1.1\r\n" + host + "\r\n", 400, "control"},
		"control in the method":       {"GE\x01T http://ORIGIN/bad HTTP/1.1\r\n" + host + "\r\n", 400, ""},

		// The request line.
		"HTTP/0.9 without a version": {"GET http://ORIGIN/bad\r\n\r\n", 400, "request line"},
		"HTTP/0.9 by name":           {"GET http://ORIGIN/bad HTTP/0.9\r\n" + host + "\r\n", 505, "version"},
		"HTTP/1.2":                   {"GET http://ORIGIN/bad HTTP/1.2\r\n" + host + "\r\n", 505, "version"},
		"HTTP/2.0":                   {"GET http://ORIGIN/bad HTTP/2.0\r\n" + host + "\r\n", 505, "version"},
		"HTTP/2 preface":             {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "version"},
		"version in small letters":   {"GET http://ORIGIN/bad http/1.1\r\n" + host + "\r\n", 400, "version"},
		"version of two digits":      {"GET http://ORIGIN/bad HTTP/1.10\r\n" + host + "\r\n", 400, "version"},
		"version with a word more":   {"GET http://ORIGIN/bad HTTP/1.1 x\r\n" + host + "\r\n", 400, ""},
		"two spaces":                 {"GET  http://ORIGIN/bad HTTP/1.1\r\n" + host + "\r\n", 400, "request line"},
		"space in the target":        {"GET http://ORIGIN/b ad HTTP/1.1\r\n" + host + "\r\n", 400, "request line"},
		"space at the start":         {" GET http://ORIGIN/bad HTTP/1.1\r\n" + host + "\r\n", 400, ""},
		"method that is no token":    {"G(E)T http://ORIGIN/bad HTTP/1.1\r\n" + host + "\r\n", 400, "method"},
		"TLS":                        {"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03", 400, "TLS"},
		"SOCKS":                      {"\x05\x01\x00", 400, "not an HTTP request"},

		// The target.
		"origin-form":              {"GET /bad HTTP/1.1\r\n" + host + "\r\n", 400, "this is a proxy"},
		"asterisk-form":            {"OPTIONS * HTTP/1.1\r\n" + host + "\r\n", 400, "this is a proxy"},
		"https://":                 {"GET https://ORIGIN/bad HTTP/1.1\r\n" + host + "\r\n", 400, "CONNECT"},
		"ftp://":                   {"GET ftp://ORIGIN/bad HTTP/1.1\r\n" + host + "\r\n", 400, "http://"},
		"authority-form":           {"GET ORIGIN HTTP/1.1\r\n" + host + "\r\n", 400, "http://"},
		"no authority":             {"GET http:///bad HTTP/1.1\r\n" + host + "\r\n", 400, "host"},
		"user information":         {"GET http://me@ORIGIN/bad HTTP/1.1\r\n" + host + "\r\n", 400, "user information"},
		"fragment":                 {"GET http://ORIGIN/bad#x HTTP/1.1\r\n" + host + "\r\n", 400, "fragment"},
		"host above ASCII":         {"GET http://\xc3\xb6.test/bad HTTP/1.1\r\n" + host + "\r\n", 400, "host"},
		"host with an escape":      {"GET http://192%2e0.2.80/bad HTTP/1.1\r\n" + host + "\r\n", 400, "host"},
		"IPv4 of two numbers":      {"GET http://127.1/bad HTTP/1.1\r\n" + host + "\r\n", 400, "host"},
		"IPv4 of one number":       {"GET http://3221226064/bad HTTP/1.1\r\n" + host + "\r\n", 400, "host"},
		"IPv4 with an octal":       {"GET http://0300.0.2.80/bad HTTP/1.1\r\n" + host + "\r\n", 400, "host"},
		"IPv6 with a zone":         {"GET http://[fe80::1%25eth0]/bad HTTP/1.1\r\n" + host + "\r\n", 400, "zone"},
		"IPv6 without brackets":    {"GET http://2001:db8:80::80/bad HTTP/1.1\r\n" + host + "\r\n", 400, "host"},
		"port 0":                   {"GET http://192.0.2.80:0/bad HTTP/1.1\r\n" + host + "\r\n", 400, "port"},
		"port over 65535":          {"GET http://192.0.2.80:65536/bad HTTP/1.1\r\n" + host + "\r\n", 400, "port"},
		"no port after the colon":  {"GET http://192.0.2.80:/bad HTTP/1.1\r\n" + host + "\r\n", 400, "port"},
		"CONNECT without a port":   {"CONNECT 192.0.2.80 HTTP/1.1\r\n" + host + "\r\n", 400, "host:port"},
		"CONNECT without a host":   {"CONNECT :8080 HTTP/1.1\r\n" + host + "\r\n", 400, ""},
		"CONNECT to port 0":        {"CONNECT 192.0.2.80:0 HTTP/1.1\r\n" + host + "\r\n", 400, "port"},
		"CONNECT to a name's port": {"CONNECT 192.0.2.80:http HTTP/1.1\r\n" + host + "\r\n", 400, "port"},
		"CONNECT to a URL":         {"CONNECT http://ORIGIN/bad HTTP/1.1\r\n" + host + "\r\n", 400, ""},
		"CONNECT to a path":        {"CONNECT /bad HTTP/1.1\r\n" + host + "\r\n", 400, ""},

		// Fields that the proxy itself has to do with.
		"no Host":                 {line + "\r\n", 400, "Host"},
		"two Hosts":               {get + "Host: other.test\r\n\r\n", 400, "Host"},
		"two equal Hosts":         {get + host + "\r\n", 400, "Host"},
		"empty Host":              {line + "Host:\r\n\r\n", 400, "Host"},
		"Host that is a list":     {line + "Host: ORIGIN, other.test\r\n\r\n", 400, "Host"},
		"Host with a path":        {line + "Host: ORIGIN/x\r\n\r\n", 400, "Host"},
		"another expectation":     {post + "Content-Length: 2\r\nExpect: a-miracle\r\n\r\nhi", 417, "expectation"},
		"credentials that differ": {get + "Proxy-Authorization: Basic YTpi" + "\r\n" + "Proxy-Authorization: Basic YTpj" + "\r\n\r\n", 400, "differ"},

		// Sizes.
		"head over the limit":         {get + "A: " + long + "\r\n\r\n", 431, "head"},
		"head over it by many fields": {get + strings.Repeat("A: "+long[:900]+"\r\n", 10) + "\r\n", 431, "head"},
		"head that never ends":        {get + "A: " + long, 431, "head"},
		"too many fields":             {get + strings.Repeat("A: b\r\n", 40) + "\r\n", 431, "fields"},
		"long target":                 {"GET http://ORIGIN/" + long[:3000] + " HTTP/1.1\r\n" + host + "\r\n", 431, "target"},

		// Chunks.
		"no chunk size":                  {chunked + "\r\nhi\r\n0\r\n\r\n", 400, "chunk size"},
		"chunk size that is no number":   {chunked + "g\r\nhi\r\n0\r\n\r\n", 400, "chunk size"},
		"negative chunk size":            {chunked + "-2\r\nhi\r\n0\r\n\r\n", 400, "chunk size"},
		"chunk size with 0x":             {chunked + "0x2\r\nhi\r\n0\r\n\r\n", 400, "chunk size"},
		"chunk size with a space":        {chunked + "2 \r\nhi\r\n0\r\n\r\n", 400, "chunk size"},
		"chunk size over 64 bits":        {chunked + "10000000000000002\r\nhi\r\n0\r\n\r\n", 400, "chunk size"},
		"chunk size ends in LF":          {chunked + "2\nhi\r\n0\r\n\r\n", 400, "LF"},
		"chunk size ends in CR":          {chunked + "2\rx\nhi\r\n0\r\n\r\n", 400, ""},
		"control in a chunk extension":   {chunked + "2;a=\x00\r\nhi\r\n0\r\n\r\n", 400, "extension"},
		"chunk extension that goes on":   {chunked + "2;" + long[:2000] + "\r\nhi\r\n0\r\n\r\n", 400, "extension"},
		"chunk longer than its size":     {chunked + "2\r\nhi!\r\n0\r\n\r\n", 400, "longer"},
		"chunk data ends in LF":          {chunked + "2\r\nhi\n0\r\n\r\n", 400, ""},
		"second chunk without a size":    {chunked + "2\r\nhi\r\n\r\n0\r\n\r\n", 400, "chunk size"},
		"trailer without a colon":        {chunked + "2\r\nhi\r\n0\r\nNonsense\r\n\r\n", 400, "trailer"},
		"trailer that ends in LF":        {chunked + "2\r\nhi\r\n0\r\nA: b\n\r\n", 400, "LF"},
		"trailer that is folded":         {chunked + "2\r\nhi\r\n0\r\nA: b\r\n c\r\n\r\n", 400, "trailer"},
		"coding in a trailer":            {chunked + "2\r\nhi\r\n0\r\nTransfer-Encoding: gzip\r\n\r\n", 400, "trailer"},
		"trailer section over its limit": {chunked + "2\r\nhi\r\n0\r\nA: " + long + "\r\n\r\n", 431, "trailer"},

		// And others of each kind.
		"bare LF at the start":              {"\n" + get + "\r\n", 400, "LF without CR"},
		"two empty lines at the start":      {"\r\n\r\n" + get + "\r\n", 400, ""},
		"bare CR in a value":                {get + "A: b\rc\r\n\r\n", 400, "control"},
		"bare CR in the target":             {"GET http://ORIGIN/bad\rx HTTP/1.1\r\n" + host + "\r\n", 400, "control"},
		"NUL in the target":                 {"GET http://ORIGIN/bad\x00 HTTP/1.1\r\n" + host + "\r\n", 400, "control"},
		"vertical tab before the colon":     {get + "A\v: b\r\n\r\n", 400, "control"},
		"method above ASCII":                {"G\xffT http://ORIGIN/bad HTTP/1.1\r\n" + host + "\r\n", 400, "method"},
		"one word":                          {"GET\r\n\r\n", 400, "request line"},
		"space at the end":                  {"GET http://ORIGIN/bad HTTP/1.1 \r\n" + host + "\r\n", 400, ""},
		"tab between":                       {"GET\thttp://ORIGIN/bad HTTP/1.1\r\n" + host + "\r\n", 400, ""},
		"HTTP/11":                           {"GET http://ORIGIN/bad HTTP/11\r\n" + host + "\r\n", 400, "version"},
		"Host with userinfo":                {line + "Host: a@b\r\n\r\n", 400, "Host"},
		"Host with a bad port":              {line + "Host: a:b\r\n\r\n", 400, "Host"},
		"backslash":                         {"GET http://ORIGIN\\@evil/ HTTP/1.1\r\n" + host + "\r\n", 400, ""},
		"escape in the host":                {"GET http://a%2eb/ HTTP/1.1\r\n" + host + "\r\n", 400, "host"},
		"hexadecimal IPv4":                  {"GET http://0x7f000001/ HTTP/1.1\r\n" + host + "\r\n", 400, "host"},
		"signed port":                       {"GET http://a:+80/ HTTP/1.1\r\n" + host + "\r\n", 400, "port"},
		"IPv6 unclosed":                     {"GET http://[::1/ HTTP/1.1\r\n" + host + "\r\n", 400, "host"},
		"IPv4 in brackets":                  {"GET http://[127.0.0.1]/ HTTP/1.1\r\n" + host + "\r\n", 400, "host"},
		"long label":                        {"GET http://" + long[:64] + ".test/ HTTP/1.1\r\n" + host + "\r\n", 400, "host"},
		"long name":                         {"GET http://" + strings.Repeat("abc.", 64) + "test/ HTTP/1.1\r\n" + host + "\r\n", 400, "host"},
		"empty label":                       {"GET http://a..b/ HTTP/1.1\r\n" + host + "\r\n", 400, "host"},
		"CONNECT to an IPv6 without a port": {"CONNECT [::1] HTTP/1.1\r\n" + host + "\r\n", 400, "host:port"},
		"CONNECT with two Hosts":            {"CONNECT ORIGIN HTTP/1.1\r\n" + host + host + "\r\n", 400, "more than one Host"},
		"identity":                          {post + "Transfer-Encoding: identity\r\n\r\n", 501, "chunked"},
		"chunked with a parameter":          {post + "Transfer-Encoding: chunked;x\r\n\r\n", 501, "chunked"},
		"chunked with a vertical tab":       {post + "Transfer-Encoding: \vchunked\r\n\r\n", 400, "control"},
		"Connection: Transfer-Encoding":     {post + "Connection: transfer-encoding\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "Connection names"},
		"Connection without end":            {get + "Connection: " + strings.Repeat("a,", 200) + "a\r\n\r\n", 400, "too many"},
		"Max-Forwards":                      {"TRACE http://ORIGIN/bad HTTP/1.1\r\n" + host + "Max-Forwards: x\r\n\r\n", 400, "Max-Forwards"},
		"endless target":                    {"GET http://ORIGIN/bad" + long, 431, "target"},
		"chunk size signed":                 {chunked + "+5\r\nhello\r\n0\r\n\r\n", 400, "chunk size"},
		"chunk size after a space":          {chunked + " 5\r\nhello\r\n0\r\n\r\n", 400, "chunk size"},
		"chunk size, bare CR":               {chunked + "5\rX\r\nhello\r\n0\r\n\r\n", 400, "chunk size"},
		"chunk extension with a control":    {chunked + "5;a=\x01\r\nhello\r\n0\r\n\r\n", 400, "extension"},
	}
}
