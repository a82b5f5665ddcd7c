// The official Go SDK as a client of the broker: sdk URL. See package lines.
package main

import (
	"context"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/modelcontextprotocol/go-sdk/auth"
	"github.com/modelcontextprotocol/go-sdk/mcp"
	"github.com/modelcontextprotocol/go-sdk/oauthex"
	"golang.org/x/oauth2"

	"real_clients/lines"
)

// tokens is the SDK's own token source, made anew where the token is to be taken for expired.
type tokens struct {
	guard  sync.Mutex
	ctx    context.Context
	config *oauth2.Config
	token  *oauth2.Token
}

func (t *tokens) Token() (*oauth2.Token, error) {
	t.guard.Lock()
	defer t.guard.Unlock()
	token, err := t.config.TokenSource(t.ctx, t.token).Token()
	if err == nil {
		t.token = token
	}
	return token, err
}

func (t *tokens) expire() {
	t.guard.Lock()
	defer t.guard.Unlock()
	aged := *t.token
	aged.Expiry = time.Now().Add(-time.Second)
	t.token = &aged
}

type client struct {
	session  *mcp.ClientSession
	tokens   *tokens
	progress atomic.Int64
}

func (c *client) Expire() { c.tokens.expire() }

func (c *client) Call(name string, arguments map[string]any) (lines.Result, error) {
	c.progress.Store(0)
	params := &mcp.CallToolParams{Name: name, Arguments: arguments}
	params.SetProgressToken("told")
	answer, err := c.session.CallTool(context.Background(), params)
	if err != nil {
		return lines.Result{}, err
	}
	// The SDK handles notifications beside answers: the last may still be on its way to its handler.
	wanted, _ := arguments["n"].(float64)
	for wait := 0; wait < 3000 && c.progress.Load() < int64(wanted); wait++ {
		time.Sleep(10 * time.Millisecond)
	}
	result := lines.Result{IsError: answer.IsError, Progress: int(c.progress.Load())}
	for _, part := range answer.Content {
		if text, ok := part.(*mcp.TextContent); ok {
			result.Text += text.Text
		}
	}
	return result, nil
}

func authorize(_ context.Context, asked *auth.AuthorizationArgs) (*auth.AuthorizationResult, error) {
	query, err := lines.Authorize(asked.URL)
	if err != nil {
		return nil, err
	}
	return &auth.AuthorizationResult{Code: query.Get("code"), State: query.Get("state"), Iss: query.Get("iss")}, nil
}

func connect(endpoint string) (*client, string, error) {
	made := &client{}
	handler, err := auth.NewAuthorizationCodeHandler(&auth.AuthorizationCodeHandlerConfig{
		AuthorizationCodeFetcher: authorize,
		RequestRefreshToken:      true,
		DynamicClientRegistrationConfig: &auth.DynamicClientRegistrationConfig{
			Metadata: &oauthex.ClientRegistrationMetadata{
				ClientName:   "go-sdk",
				RedirectURIs: []string{lines.RedirectURI},
				GrantTypes:   []string{"authorization_code", "refresh_token"},
			},
		},
		NewTokenSource: func(ctx context.Context, config *oauth2.Config, token *oauth2.Token) (oauth2.TokenSource, error) {
			made.tokens = &tokens{ctx: context.WithoutCancel(ctx), config: config, token: token}
			return made.tokens, nil
		},
	})
	if err != nil {
		return nil, "", err
	}
	options := &mcp.ClientOptions{
		ElicitationHandler: func(context.Context, *mcp.ElicitRequest) (*mcp.ElicitResult, error) {
			return &mcp.ElicitResult{Action: "accept", Content: map[string]any{"answer": "scripted"}}, nil
		},
		ProgressNotificationHandler: func(context.Context, *mcp.ProgressNotificationClientRequest) { made.progress.Add(1) },
	}
	transport := &mcp.StreamableClientTransport{Endpoint: endpoint, OAuthHandler: handler}
	session, err := mcp.NewClient(&mcp.Implementation{Name: "go-sdk", Version: "1"}, options).
		Connect(context.Background(), transport, nil)
	if err != nil {
		return nil, "", err
	}
	made.session = session
	return made, session.InitializeResult().ProtocolVersion, nil
}

func main() {
	connected, version, err := connect(os.Args[1])
	if err != nil {
		lines.Fail(err)
		os.Exit(1)
	}
	lines.Serve(connected, version)
	connected.session.Close()
}
