// @ai-sdk/mcp as a client of the broker: `ai_client.mjs URL`. It takes a command a line, as ts_client.mjs does.
import { auth, createMCPClient, ElicitationRequestSchema, UnauthorizedError } from '@ai-sdk/mcp'
import { callback, input, Provider, say, textOf } from './provider.mjs'

const [url] = process.argv.slice(2)

class AiProvider extends Provider {
    isClientInformationDynamicallyRegistered() { return true }
    authorizationServerInformation() { return this.stored.server }
    saveAuthorizationServerInformation(server) { this.stored.server = server }
    state() { return crypto.randomUUID() }
    saveState(state) { this.stored.state = state }
    storedState() { return this.stored.state }
}

const provider = new AiProvider('ai-sdk')
const isUnauthorized = error => error instanceof UnauthorizedError || (error?.cause && isUnauthorized(error.cause))

// Carries something out, after a login where the library says that it needs one.
async function withLogin(act) {
    try {
        return await act()
    } catch (error) {
        if (!isUnauthorized(error)) throw error
        const query = await callback()
        await auth(provider, { serverUrl: url, authorizationCode: query.get('code'), callbackState: query.get('state'), callbackIssuer: query.get('iss') })
        return act()
    }
}

async function connect() {
    const client = await createMCPClient({ transport: { type: 'http', url, authProvider: provider }, clientName: 'ai-sdk', capabilities: { elicitation: {} } })
    client.onElicitationRequest(ElicitationRequestSchema, () => ({ action: 'accept', content: { answer: 'scripted' } }))
    return [client, await client.tools()]
}

const [client, tools] = await withLogin(connect).catch(error => { say({ error: String(error) }); process.exit(1) })
say({ server: client.serverInfo?.name, tools: Object.keys(tools).length, version: client.protocolVersion })
for (;;) {
    const { value, done } = await input.next()
    if (done || value === 'quit') break
    const [verb, name, ...rest] = value.split(' ')
    if (verb === 'expire') { say({ expired: true }); continue } // it learns so from the 401
    try {
        const result = await withLogin(() => tools[name].execute(rest.length ? JSON.parse(rest.join(' ')) : {}, { toolCallId: '1', messages: [] }))
        say({ call: { text: textOf(result), is_error: result.isError ?? false } })
    } catch (error) {
        say({ error: String(error) })
    }
}
await client.close()
process.exit(0)
