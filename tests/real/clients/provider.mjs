// What the JavaScript clients share: a store of what OAuth leaves, and a person at the other end of stdin and stdout.
// {"authorize": URL} asks for a login, the line that comes back is the callback's URL.
import { createInterface } from 'node:readline/promises'

export const say = value => console.log(JSON.stringify(value))
export const input = createInterface({ input: process.stdin })[Symbol.asyncIterator]()
export const textOf = result => result.content.map(part => part.text ?? '').join('')
const redirectUri = 'http://localhost:33418/callback'

export class Provider {
    stored = {}
    rounds = 0
    constructor(name) { this.name = name }
    get redirectUrl() { return redirectUri }
    get clientMetadata() {
        return { client_name: this.name, redirect_uris: [redirectUri], grant_types: ['authorization_code', 'refresh_token'],
                 response_types: ['code'], token_endpoint_auth_method: 'none' }
    }
    clientInformation() { return this.stored.client }
    saveClientInformation(client) { this.stored.client = client }
    tokens() { return this.stored.tokens }
    saveTokens(tokens) { this.stored.tokens = tokens }
    codeVerifier() { return this.stored.verifier }
    saveCodeVerifier(verifier) { this.stored.verifier = verifier }
    invalidateCredentials(what) { if (what === 'all' || what === 'tokens') delete this.stored.tokens }
    redirectToAuthorization(where) { this.rounds += 1; say({ authorize: String(where) }) }
}

// The query of the callback that the person comes back with.
export const callback = async () => new URL((await input.next()).value).searchParams
