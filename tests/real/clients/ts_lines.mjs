// What a connected TypeScript client does by the line: {"call", "touch", "start", "cancel"} as the Python clients of this folder do.
const updates = []
let heard = () => {}

export function hearUpdates(sdk, client, line) {
    const name = line === '1' ? sdk.ResourceUpdatedNotificationSchema : 'notifications/resources/updated'
    client.setNotificationHandler(name, note => { updates.push(note.params.uri); heard() })
}

async function nextUpdate() {
    while (!updates.length) await new Promise(resolve => { heard = resolve })
    return updates.shift()
}

async function updated(client, modern, uri, cause) {
    const listening = modern ? await client.listen({ resourceSubscriptions: [uri] }) : await client.subscribeResource({ uri })
    await cause()
    const told = await nextUpdate()
    await (modern ? listening.close() : client.unsubscribeResource({ uri }))
    return told
}

export async function answerLines(client, modern, input, call, say) {
    let started
    for (;;) {
        const { value, done } = await input.next()
        if (done || !value.trim() || value === 'quit') return
        const [verb, name, ...rest] = value.split(' ')
        const args = rest.length ? JSON.parse(rest.join(' ')) : {}
        try {
            if (verb === 'call') say({ call: await call(name, args) })
            if (verb === 'touch') say({ touched: await updated(client, modern, name, () => call('get_touched', { uri: name })) })
            if (verb === 'start') {
                const abort = new AbortController()
                started = { abort, ended: call(name, args, { signal: abort.signal }).catch(() => 'aborted') }
                say({ started: name })
            }
            if (verb === 'cancel') {
                started.abort.abort()
                await started.ended
                say({ cancelled: true })
            }
        } catch (error) {
            say({ error: String(error) })
        }
    }
}
