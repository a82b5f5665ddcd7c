// Reverse proxy that adds "Authorization: Bearer <token>", so that the suite can run against a protected /mcp.
// usage: BEARER=token node inject-bearer.mjs http://127.0.0.1:UPSTREAM_PORT ; its own port, a free one, is printed.
// A Host or Origin that names this proxy is rewritten to the upstream's; any other (the DNS rebinding probe) is passed on as sent.
import http from 'node:http'

const upstream = new URL(process.argv[2])
const own = new Set()
const server = http.createServer((question, answer) => {
    const headers = { ...question.headers, authorization: 'Bearer ' + process.env.BEARER }
    if (own.has(headers.host)) headers.host = upstream.host
    if (headers.origin && own.has(headers.origin.replace(/^https?:\/\//, ''))) headers.origin = upstream.origin
    const target = { hostname: upstream.hostname, port: upstream.port, path: question.url, method: question.method, headers,
                     setHost: false, agent: false }
    const passed = http.request(target, response => {
        answer.writeHead(response.statusCode, response.headers)
        answer.flushHeaders()
        response.pipe(answer)
        response.on('error', () => answer.destroy())
    })
    passed.on('error', () => { if (!answer.headersSent) answer.writeHead(502); answer.end() })
    answer.on('close', () => passed.destroy())
    question.pipe(passed)
})
server.listen(0, '127.0.0.1', () => {
    for (const name of ['127.0.0.1', 'localhost']) own.add(`${name}:${server.address().port}`)
    console.log(server.address().port)
})
