// A minimal MCP server on mcp-go, the SDK of forgejo-mcp: a tool says which one really ran.
// With the argument "read" it only tells, for each line, what encoding/json makes of that message.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"os"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"
)

// The members of a message that decide something, as a Go program declares them.
type message struct {
	Method string `json:"method"`
	Params struct {
		Name            any `json:"name"`
		Arguments       any `json:"arguments"`
		URI             any `json:"uri"`
		Level           any `json:"level"`
		Cursor          any `json:"cursor"`
		TaskID          any `json:"taskId"`
		RequestID       any `json:"requestId"`
		ProgressToken   any `json:"progressToken"`
		ProtocolVersion any `json:"protocolVersion"`
		Capabilities    any `json:"capabilities"`
		Notifications   any `json:"notifications"`
		Meta            struct {
			ProgressToken   any `json:"progressToken"`
			ProtocolVersion any `json:"io.modelcontextprotocol/protocolVersion"`
			Capabilities    any `json:"io.modelcontextprotocol/clientCapabilities"`
			LogLevel        any `json:"io.modelcontextprotocol/logLevel"`
		} `json:"_meta"`
	} `json:"params"`
}

func read() {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<24)
	out := json.NewEncoder(os.Stdout)
	for lines.Scan() {
		var seen message
		if err := json.Unmarshal(lines.Bytes(), &seen); err != nil {
			out.Encode(map[string]string{"error": err.Error()})
			continue
		}
		out.Encode(seen)
	}
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "read" {
		read()
		return
	}
	s := server.NewMCPServer("probe", "1", server.WithToolCapabilities(true))
	for _, name := range []string{"get_my_user_info", "delete_repo"} {
		name := name
		s.AddTool(mcp.NewTool(name), func(ctx context.Context, r mcp.CallToolRequest) (*mcp.CallToolResult, error) {
			return mcp.NewToolResultText("RAN " + name), nil
		})
	}
	server.ServeStdio(s)
}
