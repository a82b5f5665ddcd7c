// The MCP TypeScript SDK as a client of the broker: `ts_client.mjs 1|2 URL [MODE [--interactive-lines]]`, 1 for @modelcontextprotocol/sdk and 2 for
// @modelcontextprotocol/client. The person is at the other end of stdin and stdout: {"authorize": URL} asks for a login,
// the line that comes back is the callback's URL. The last line printed is the result; by the line, one for each command.
import { createInterface } from 'node:readline/promises'
import { answerLines, hearUpdates } from './ts_lines.mjs'

const [line, url, mode, lines] = process.argv.slice(2)
const sdk = line === '1'
    ? { ...(await import('@modelcontextprotocol/sdk/client/index.js')),
        ...(await import('@modelcontextprotocol/sdk/client/streamableHttp.js')),
        ...(await import('@modelcontextprotocol/sdk/client/auth.js')),
        ...(await import('@modelcontextprotocol/sdk/types.js')) }
    : await import('@modelcontextprotocol/client')

const say = value => console.log(JSON.stringify(value))
const input = createInterface({ input: process.stdin })[Symbol.asyncIterator]()
const redirectUri = 'http://localhost:33418/callback'

class Provider {
    stored = {}
    rounds = 0
    get redirectUrl() { return redirectUri }
    get clientMetadata() {
        return { client_name: 'ts' + line, redirect_uris: [redirectUri], grant_types: ['authorization_code', 'refresh_token'],
                 response_types: ['code'], token_endpoint_auth_method: 'none' }
    }
    clientInformation() { return this.stored.client }
    saveClientInformation(client) { this.stored.client = client }
    tokens() { return this.stored.tokens }
    saveTokens(tokens) { this.stored.tokens = tokens }
    codeVerifier() { return this.stored.verifier }
    saveCodeVerifier(verifier) { this.stored.verifier = verifier }
    redirectToAuthorization(where) { this.rounds += 1; say({ authorize: String(where) }) }
}

const provider = new Provider()
const questions = []

function newClient() {
    const options = { capabilities: { elicitation: {} }, ...(mode ? { versionNegotiation: { mode } } : {}) }
    const client = new sdk.Client({ name: 'ts' + line, version: '1' }, options)
    const answer = async request => { questions.push(request.params.message); return { action: 'accept', content: { answer: 'scripted' } } }
    client.setRequestHandler(line === '1' ? sdk.ElicitRequestSchema : 'elicitation/create', answer)
    hearUpdates(sdk, client, line)
    return client
}

async function connect() {
    const transport = new sdk.StreamableHTTPClientTransport(new URL(url), { authProvider: provider })
    const client = newClient()
    try {
        await client.connect(transport)
        return [client, transport]
    } catch (error) {
        if (!(error instanceof sdk.UnauthorizedError)) throw error
        const query = new URL((await input.next()).value).searchParams
        await transport.finishAuth(...(line === '1' ? [query.get('code')] : [query]))
        return connect()
    }
}

const textOf = result => result.content.map(part => part.text ?? '').join('')
const [client, transport] = await connect()
const call = (name, options) =>
    line === '1' ? client.callTool({ name, arguments: {} }, undefined, options) : client.callTool({ name, arguments: {} }, options)
if (lines) {
    let progress = 0
    const version = transport.protocolVersion ?? client.getNegotiatedProtocolVersion?.()
    say({ server: client.getServerVersion()?.name, version })
    await answerLines(client, version >= '2026', input, async (name, args, options) => {
        progress = 0
        const request = [{ name, arguments: args }, ...(line === '1' ? [undefined] : [])]
        const answered = await client.callTool(...request, { ...options, onprogress: () => { progress += 1 } })
        return { text: textOf(answered), is_error: answered.isError ?? false, progress_count: progress }
    }, say)
    await client.close()
    process.exit(0)
}
const result = { server: client.getServerVersion()?.name, tools: (await client.listTools()).tools.length }
result.first = textOf(await call('get_my_user_info'))
if (result.tools < 100) {
    let progress = 0
    await call('get_progress', { onprogress: () => { progress += 1 } })
    result.progress = progress
    result.elicit = JSON.parse(textOf(await call('ask_elicit'))).action
}
const before = provider.stored.tokens.refresh_token
provider.stored.tokens = { ...provider.stored.tokens, access_token: 'not-a-token' }
result.second = textOf(await call('get_my_user_info'))
result.refreshed = provider.stored.tokens.refresh_token !== before
result.rounds = provider.rounds
result.questions = questions.length
if (transport.terminateSession) await transport.terminateSession()
await client.close()
say(result)
process.exit(0)
