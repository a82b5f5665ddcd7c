// The MCP TypeScript SDK in a page of a browser: `?url=URL` names the broker, at another origin than the page's.
// A login opens a window; its callback is a page of this origin, which tells this one. `ask(line)` begins what a line says, `take()`
// gives the answer once it is there, as the other clients of this folder print it.
import { Client, StreamableHTTPClientTransport, UnauthorizedError } from '@modelcontextprotocol/client'

const url = new URL(location).searchParams.get('url')
const logins = new BroadcastChannel('logins')

class Provider {
    stored = {}
    rounds = 0
    get redirectUrl() { return location.origin + '/callback' }
    get clientMetadata() {
        return { client_name: 'A page', redirect_uris: [this.redirectUrl], grant_types: ['authorization_code', 'refresh_token'],
                 response_types: ['code'], token_endpoint_auth_method: 'none' }
    }
    clientInformation() { return this.stored.client }
    saveClientInformation(client) { this.stored.client = client }
    tokens() { return this.stored.tokens }
    saveTokens(tokens) { this.stored.tokens = tokens }
    codeVerifier() { return this.stored.verifier }
    saveCodeVerifier(verifier) { this.stored.verifier = verifier }
    invalidateCredentials(what) { if (what === 'all' || what === 'tokens') delete this.stored.tokens }
    redirectToAuthorization(where) {
        this.rounds += 1
        this.callback = new Promise(resolve => { logins.onmessage = told => resolve(new URLSearchParams(told.data)) })
        window.open(where)
    }
}

const provider = new Provider()
let client, transport

// Carries something out, after a login where the SDK says that it needs one.
async function withLogin(act) {
    try {
        return await act()
    } catch (error) {
        if (!(error instanceof UnauthorizedError)) throw error
        await transport.finishAuth(await provider.callback)
        return act()
    }
}

async function connect() {
    transport = new StreamableHTTPClientTransport(new URL(url), { authProvider: provider })
    client = new Client({ name: 'page', version: '1' }, { capabilities: { elicitation: {} }, versionNegotiation: { mode: 'auto' } })
    client.setRequestHandler('elicitation/create', async () => ({ action: 'accept', content: { answer: 'scripted' } }))
    await client.connect(transport)
    return { version: client.getNegotiatedProtocolVersion() }
}

async function call(name, given) {
    let progress = 0
    const result = await withLogin(() => client.callTool({ name, arguments: given }, { onprogress: () => { progress += 1 } }))
    return { call: { text: result.content.map(part => part.text ?? '').join(''), progress_count: progress } }
}

let answer
window.take = () => { const taken = answer; answer = undefined; return taken }
window.rounds = () => provider.rounds
window.ask = (verb, name, given) => {
    const doing = verb === 'connect' ? withLogin(connect) : call(name, given)
    doing.then(value => { answer = value }, error => { answer = { error: String(error) } })
}
