// Package lines is what the Go clients share: they take a command a line on stdin and answer each with a line of JSON.
//
// The person is at the other end: {"authorize": URL} asks for a login, the line that comes back is the callback's URL.
// Then "call NAME [ARGUMENTS]" calls a tool and "expire" lets the client believe that its token has expired.
package lines

import (
	"bufio"
	"encoding/json"
	"errors"
	"net/url"
	"os"
	"strings"
)

// RedirectURI is where the person's browser ends; nobody listens there, the person tells what it said.
const RedirectURI = "http://localhost:33418/callback"

var input = bufio.NewScanner(os.Stdin)

// Result is what a call came to.
type Result struct {
	Text     string `json:"text"`
	IsError  bool   `json:"is_error"`
	Progress int    `json:"progress_count"`
}

// Client is one library's client, connected.
type Client interface {
	Call(name string, arguments map[string]any) (Result, error)
	Expire()
}

// Say prints one line.
func Say(value any) {
	line, _ := json.Marshal(value)
	os.Stdout.Write(append(line, '\n'))
}

func read() (string, bool) {
	if !input.Scan() {
		return "", false
	}
	return input.Text(), true
}

// Authorize has the person log in; the query of the callback.
func Authorize(where string) (url.Values, error) {
	Say(map[string]string{"authorize": where})
	answer, there := read()
	if !there {
		return nil, errors.New("nobody is there to log in")
	}
	callback, err := url.Parse(answer)
	if err != nil {
		return nil, err
	}
	return callback.Query(), nil
}

// Serve says what the client came to and carries out commands until the input ends.
func Serve(client Client, version string) {
	Say(map[string]string{"version": version})
	for line, there := read(); there && line != "quit"; line, there = read() {
		verb, rest, _ := strings.Cut(line, " ")
		switch verb {
		case "call":
			Say(call(client, rest))
		case "expire":
			client.Expire()
			Say(map[string]bool{"expired": true})
		default:
			Fail(errors.New("unknown command " + verb))
		}
	}
}

func call(client Client, rest string) any {
	name, text, given := strings.Cut(rest, " ")
	arguments := map[string]any{}
	if given {
		if err := json.Unmarshal([]byte(text), &arguments); err != nil {
			return map[string]string{"error": err.Error()}
		}
	}
	result, err := client.Call(name, arguments)
	if err != nil {
		return map[string]string{"error": err.Error()}
	}
	return map[string]Result{"call": result}
}

// Fail says what went wrong.
func Fail(err error) {
	Say(map[string]string{"error": err.Error()})
}
