// mark3labs/mcp-go as a client of the broker: mark3labs URL. See package lines.
package main

import (
	"context"
	"errors"
	"os"
	"sync/atomic"
	"time"

	"github.com/mark3labs/mcp-go/client"
	"github.com/mark3labs/mcp-go/client/transport"
	"github.com/mark3labs/mcp-go/mcp"

	"real_clients/lines"
)

type person struct{}

func (person) Elicit(context.Context, mcp.ElicitationRequest) (*mcp.ElicitationResult, error) {
	return &mcp.ElicitationResult{ElicitationResponse: mcp.ElicitationResponse{
		Action: mcp.ElicitationResponseActionAccept, Content: map[string]any{"answer": "scripted"},
	}}, nil
}

type connected struct {
	client   *client.Client
	store    transport.TokenStore
	progress atomic.Int64
}

// Expire moves the stored token's end into the past: the library refreshes by its own clock alone.
func (c *connected) Expire() {
	if token, err := c.store.GetToken(context.Background()); err == nil {
		aged := *token
		aged.ExpiresAt = time.Now().Add(-time.Second)
		c.store.SaveToken(context.Background(), &aged)
	}
}

func (c *connected) Call(name string, arguments map[string]any) (lines.Result, error) {
	c.progress.Store(0)
	request := mcp.CallToolRequest{}
	request.Params.Name, request.Params.Arguments = name, arguments
	request.Params.Meta = &mcp.Meta{ProgressToken: "told"}
	var answer *mcp.CallToolResult
	err := c.withLogin(func() (err error) {
		answer, err = c.client.CallTool(context.Background(), request)
		return err
	})
	if err != nil {
		return lines.Result{}, err
	}
	result := lines.Result{IsError: answer.IsError, Progress: int(c.progress.Load())}
	for _, part := range answer.Content {
		if text, ok := part.(mcp.TextContent); ok {
			result.Text += text.Text
		}
	}
	return result, nil
}

// withLogin does something, after a login where the library asks for one: it leaves the steps to its caller.
func (c *connected) withLogin(do func() error) error {
	err := do()
	if !client.IsOAuthAuthorizationRequiredError(err) {
		return err
	}
	if err := login(client.GetOAuthHandler(err)); err != nil {
		return err
	}
	return do()
}

func login(handler *transport.OAuthHandler) error {
	ctx := context.Background()
	verifier, err := client.GenerateCodeVerifier()
	if err != nil {
		return err
	}
	state, err := client.GenerateState()
	if err != nil {
		return err
	}
	if handler.GetClientID() == "" {
		if err := handler.RegisterClient(ctx, "mark3labs"); err != nil {
			return err
		}
	}
	where, err := handler.GetAuthorizationURL(ctx, state, client.GenerateCodeChallenge(verifier))
	if err != nil {
		return err
	}
	query, err := lines.Authorize(where)
	if err != nil {
		return err
	}
	if query.Get("code") == "" {
		return errors.New("the login ended with " + query.Get("error"))
	}
	return handler.ProcessAuthorizationResponse(ctx, query.Get("code"), query.Get("state"), verifier)
}

func connect(endpoint string) (*connected, string, error) {
	ctx := context.Background()
	made := &connected{store: client.NewMemoryTokenStore()}
	config := client.OAuthConfig{RedirectURI: lines.RedirectURI, TokenStore: made.store, PKCEEnabled: true}
	wire, err := transport.NewStreamableHTTP(endpoint, transport.WithHTTPOAuth(config))
	if err != nil {
		return nil, "", err
	}
	made.client = client.NewClient(wire, client.WithElicitationHandler(person{}))
	made.client.OnNotification(func(note mcp.JSONRPCNotification) {
		if note.Method == "notifications/progress" {
			made.progress.Add(1)
		}
	})
	if err := made.withLogin(func() error { return made.client.Start(ctx) }); err != nil {
		return nil, "", err
	}
	request := mcp.InitializeRequest{}
	request.Params.ProtocolVersion = mcp.LATEST_PROTOCOL_VERSION
	request.Params.ClientInfo = mcp.Implementation{Name: "mark3labs", Version: "1"}
	err = made.withLogin(func() error {
		_, err := made.client.Initialize(ctx, request)
		return err
	})
	return made, made.client.ProtocolVersion(), err
}

func main() {
	made, version, err := connect(os.Args[1])
	if err != nil {
		lines.Fail(err)
		os.Exit(1)
	}
	lines.Serve(made, version)
	made.client.Close()
}
