// Command http-peer is Go's net/http as an independent peer of the end-to-end suites: a server, and a client that
// checks one thing and says what was wrong. Both speak HTTP/1.1 and HTTP/2 in clear text (prior knowledge).
//
//	http-peer serve PORT
//	http-peer CASE h1|h2 BASE-URL
//
// where CASE is get, post, trailers-up, trailers-down, continue, interim or many.
//
// The client exits with 0 if it saw what it should. The server's paths are those of the suites' own application
// (e2e-app), as far as the cases use them.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// Nothing that a client does may hang longer.
	limit = 30 * time.Second
	// The size of a large body: more than every window and buffer on the way holds at first.
	mebibyte = 1 << 20
	// Requests on one connection, and how many of them at once where the protocol can.
	many, atOnce = 200, 20
	// What an early hint says.
	hint = "</style.css>; rel=preload"
)

func main() {
	arguments := os.Args[1:]
	var err error
	switch {
	case len(arguments) == 2 && arguments[0] == "serve":
		err = serve(arguments[1])
	case len(arguments) == 3:
		err = call(arguments[0], arguments[1], arguments[2])
	default:
		err = errors.New("usage: http-peer serve PORT | CASE h1|h2 BASE-URL")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "http-peer:", err)
		os.Exit(1)
	}
}

// pattern makes bytes that are not all the same, so that a reordered or repeated piece shows.
func pattern(length int) []byte {
	all := make([]byte, length)
	for i := range all {
		all[i] = byte(i * 7 % 251)
	}
	return all
}

func serve(port string) error {
	paths := http.NewServeMux()
	paths.HandleFunc("/whoami", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "go") })
	paths.HandleFunc("/bytes/{length}", func(w http.ResponseWriter, r *http.Request) {
		length, err := strconv.Atoi(r.PathValue("length"))
		if err != nil {
			http.Error(w, "the path needs a number", http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", strconv.Itoa(length))
		w.Write(pattern(length))
	})
	// The body comes back while it arrives.
	paths.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		if _, err := io.Copy(w, r.Body); err != nil {
			panic(http.ErrAbortHandler)
		}
	})
	paths.HandleFunc("/trailers", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Trailer", "X-Checksum")
		io.WriteString(w, "body before trailers\n")
		w.Header().Set("X-Checksum", "0011")
	})
	paths.HandleFunc("/interim", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Link", hint)
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Del("Link")
		io.WriteString(w, "after a hint\n")
	})
	// What arrived of the request behind its body.
	paths.HandleFunc("/describe", func(w http.ResponseWriter, r *http.Request) {
		length, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		trailers := [][2]string{}
		for name, values := range r.Trailer {
			for _, value := range values {
				trailers = append(trailers, [2]string{strings.ToLower(name), value})
			}
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(map[string]any{
			"body": map[string]any{"length": length}, "trailers": trailers,
		})
	})
	server := http.Server{Addr: ":" + port, Handler: paths, Protocols: new(http.Protocols)}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	return server.ListenAndServe()
}

// client sends requests of one protocol version to one server.
type client struct {
	http http.Client
	base string
	// How many connections its requests needed.
	connections atomic.Int32
	// How many times it was invited to send a body.
	invitations atomic.Int32
	// How many early hints it got.
	hints atomic.Int32
}

func call(what, protocol, base string) error {
	transport := &http.Transport{
		Protocols:       new(http.Protocols),
		MaxConnsPerHost: 1,
		// Longer than any request may take: without an invitation the request fails.
		ExpectContinueTimeout: 2 * limit,
		DisableCompression:    true,
	}
	transport.Protocols.SetHTTP1(protocol == "h1")
	transport.Protocols.SetUnencryptedHTTP2(protocol == "h2")
	c := &client{http: http.Client{Transport: transport, Timeout: limit}, base: base}
	switch what {
	case "get":
		return c.get()
	case "post":
		return c.post(http.Header{})
	case "trailers-up":
		return c.trailersUp()
	case "trailers-down":
		return c.trailersDown()
	case "interim":
		return c.interim()
	case "continue":
		if err := c.post(http.Header{"Expect": {"100-continue"}}); err != nil {
			return err
		}
		if c.invitations.Load() != 1 {
			return fmt.Errorf("%d invitations to send the body", c.invitations.Load())
		}
		return nil
	case "many":
		return c.many(protocol == "h2")
	default:
		return fmt.Errorf("no case %q", what)
	}
}

// answer is a whole response.
type answer struct {
	body     []byte
	trailers http.Header
}

// do sends a request and reads the response to its end; anything but 200 is an error. The body is a reader of unknown
// length where there is one, which makes it chunked in HTTP/1.1.
func (c *client) do(method, path string, body io.Reader, fields, trailers http.Header) (answer, error) {
	trace := &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) {
			if !info.Reused {
				c.connections.Add(1)
			}
		},
		Got100Continue: func() { c.invitations.Add(1) },
		Got1xxResponse: func(code int, fields textproto.MIMEHeader) error {
			if code == http.StatusEarlyHints && fields.Get("Link") == hint {
				c.hints.Add(1)
			}
			return nil
		},
	}
	traced := httptrace.WithClientTrace(context.Background(), trace)
	request, err := http.NewRequestWithContext(traced, method, c.base+path, body)
	if err != nil {
		return answer{}, err
	}
	for name, values := range fields {
		request.Header[name] = values
	}
	request.Trailer = trailers
	response, err := c.http.Do(request)
	if err != nil {
		return answer{}, err
	}
	defer response.Body.Close()
	all, err := io.ReadAll(response.Body)
	if err != nil {
		return answer{}, fmt.Errorf("%s %s: reading the body after %d bytes: %w", method, path, len(all), err)
	}
	if response.StatusCode != http.StatusOK {
		reason := response.Header.Get("Outrigger-Reason")
		return answer{}, fmt.Errorf("%s %s: %s, reason %q", method, path, response.Status, reason)
	}
	return answer{body: all, trailers: response.Trailer}, nil
}

func (c *client) get() error {
	for _, length := range []int{0, 1000, mebibyte} {
		seen, err := c.do("GET", fmt.Sprintf("/bytes/%d", length), nil, nil, nil)
		if err != nil {
			return err
		}
		if !bytes.Equal(seen.body, pattern(length)) {
			return fmt.Errorf("%d bytes came for %d, or others", len(seen.body), length)
		}
	}
	return nil
}

// post sends a mebibyte and wants it back, once with its length and once, where nothing depends on it, without.
func (c *client) post(fields http.Header) error {
	content := pattern(mebibyte)
	bodies := []io.Reader{bytes.NewReader(content), struct{ io.Reader }{bytes.NewReader(content)}}
	if len(fields) > 0 {
		bodies = bodies[:1]
	}
	for _, body := range bodies {
		seen, err := c.do("POST", "/echo", body, fields, nil)
		if err != nil {
			return err
		}
		if !bytes.Equal(seen.body, content) {
			return fmt.Errorf("%d bytes came back for %d, or others", len(seen.body), len(content))
		}
	}
	return nil
}

func (c *client) trailersUp() error {
	body := struct{ io.Reader }{strings.NewReader("body")}
	seen, err := c.do("POST", "/describe", body, nil, http.Header{"X-Sum": {"42"}})
	if err != nil {
		return err
	}
	var description struct{ Trailers [][2]string }
	if err := json.Unmarshal(seen.body, &description); err != nil {
		return fmt.Errorf("reading the description %q: %w", seen.body, err)
	}
	if len(description.Trailers) != 1 || description.Trailers[0] != [2]string{"x-sum", "42"} {
		return fmt.Errorf("the server saw the trailers %q", description.Trailers)
	}
	return nil
}

func (c *client) trailersDown() error {
	seen, err := c.do("GET", "/trailers", nil, http.Header{"Te": {"trailers"}}, nil)
	if err != nil {
		return err
	}
	if seen.trailers.Get("X-Checksum") != "0011" {
		return fmt.Errorf("the trailers %q came", seen.trailers)
	}
	return nil
}

func (c *client) interim() error {
	if _, err := c.do("GET", "/interim", nil, nil, nil); err != nil {
		return err
	}
	if c.hints.Load() != 1 {
		return fmt.Errorf("%d early hints came", c.hints.Load())
	}
	return nil
}

func (c *client) many(multiplexed bool) error {
	one := func(i int) error {
		content := bytes.Repeat([]byte(fmt.Sprintf("request %d ", i)), i+1)
		seen, err := c.do("POST", "/echo", bytes.NewReader(content), nil, nil)
		if err == nil && !bytes.Equal(seen.body, content) {
			err = fmt.Errorf("%d bytes came back for %d, or others", len(seen.body), len(content))
		}
		if err != nil {
			return fmt.Errorf("request %d: %w", i, err)
		}
		return nil
	}
	// The first opens the connection that the others shall find.
	if err := one(0); err != nil {
		return err
	}
	workers := 1
	if multiplexed {
		workers = atOnce
	}
	var running sync.WaitGroup
	failures := make(chan error, workers)
	for worker := range workers {
		running.Go(func() {
			for i := 1 + worker; i < many; i += workers {
				if err := one(i); err != nil {
					failures <- err
					return
				}
			}
		})
	}
	running.Wait()
	close(failures)
	if err, failed := <-failures; failed {
		return err
	}
	if count := c.connections.Load(); count != 1 {
		return fmt.Errorf("%d requests took %d connections", many, count)
	}
	return nil
}
