/* The smallest stdio MCP server a bridge can stand before: it answers at once, so that what is measured is the bridge.
 *
 *   child [LIST_BYTES]    tools/list answers with about that many bytes (default 600)
 *
 * tools/call answers with a text of arguments.size bytes (default 2). Anything else with an id gets an empty result.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct text {
    const char *start;
    size_t length;
};

static const char *skip_space(const char *at)
{
    while (*at == ' ' || *at == '\t' || *at == '\r' || *at == '\n')
        at++;
    return at;
}

static const char *after_string(const char *at)
{
    for (at++; *at && *at != '"'; at++)
        if (*at == '\\' && at[1])
            at++;
    return *at ? at + 1 : at;
}

static const char *after_value(const char *at)
{
    int depth = 0;
    do {
        if (*at == '"') {
            at = after_string(at);
            continue;
        }
        if (*at == '{' || *at == '[')
            depth++;
        if (*at == '}' || *at == ']')
            depth--;
        if (depth < 0 || (depth == 0 && *at == ','))
            return at;
        at++;
    } while (*at && (depth > 0 || (*at != ',' && *at != '}' && *at != ']')));
    return at;
}

/* The raw value of a member of the object at `object`; length 0 when there is none. */
static struct text member(const char *object, const char *name)
{
    struct text none = {"", 0};
    size_t size = strlen(name);
    const char *at = skip_space(object);
    if (*at != '{')
        return none;
    at = skip_space(at + 1);
    while (*at == '"') {
        const char *key = at + 1;
        at = after_string(at);
        size_t key_size = (size_t)(at - key - 1);
        at = skip_space(at);
        if (*at != ':')
            return none;
        at = skip_space(at + 1);
        const char *value = at;
        at = after_value(at);
        if (key_size == size && !memcmp(key, name, size)) {
            const char *end = at;
            while (end > value && (end[-1] == ' ' || end[-1] == '\n' || end[-1] == '\r'))
                end--;
            return (struct text){value, (size_t)(end - value)};
        }
        at = skip_space(at);
        if (*at == ',')
            at = skip_space(at + 1);
    }
    return none;
}

static int is(struct text value, const char *string)
{
    return value.length == strlen(string) + 2 && !memcmp(value.start + 1, string, value.length - 2);
}

static char *out;
static size_t used, room;

static void put(const char *data, size_t size)
{
    if (used + size > room) {
        room = (used + size) * 2 + 4096;
        out = realloc(out, room);
    }
    memcpy(out + used, data, size);
    used += size;
}

static void puts_(const char *data)
{
    put(data, strlen(data));
}

static void fill(size_t size)
{
    char block[4096];
    memset(block, 'x', sizeof block);
    for (; size; size -= size < sizeof block ? size : sizeof block)
        put(block, size < sizeof block ? size : sizeof block);
}

static void list_tools(size_t bytes)
{
    char name[64];
    puts_("{\"tools\":[{\"name\":\"get_echo\",\"description\":\"Answers with text\",\"inputSchema\":{\"type\":\"object\"}}");
    for (int number = 0; used + 400 < bytes; number++) {
        snprintf(name, sizeof name, ",{\"name\":\"get_tool_%d\",\"description\":\"", number);
        puts_(name);
        fill(300);
        puts_("\",\"inputSchema\":{\"type\":\"object\"}}");
    }
    puts_("]}");
}

static void answer(const char *line, size_t list_bytes)
{
    struct text id = member(line, "id");
    struct text method = member(line, "method");
    struct text params = member(line, "params");
    if (!id.length || !method.length)
        return;
    used = 0;
    puts_("{\"jsonrpc\":\"2.0\",\"id\":");
    put(id.start, id.length);
    puts_(",\"result\":");
    if (is(method, "initialize")) {
        struct text version = member(params.length ? params.start : "", "protocolVersion");
        puts_("{\"protocolVersion\":");
        if (version.length)
            put(version.start, version.length);
        else
            puts_("\"2025-06-18\"");
        puts_(",\"capabilities\":{\"tools\":{}},\"serverInfo\":{\"name\":\"bench\",\"version\":\"1\"}}");
    } else if (is(method, "tools/list")) {
        list_tools(list_bytes);
    } else if (is(method, "tools/call")) {
        struct text arguments = member(params.length ? params.start : "", "arguments");
        struct text size = member(arguments.length ? arguments.start : "", "size");
        puts_("{\"content\":[{\"type\":\"text\",\"text\":\"");
        fill(size.length ? strtoul(size.start, NULL, 10) : 2);
        puts_("\"}]}");
    } else {
        puts_("{}");
    }
    puts_("}\n");
    for (size_t sent = 0; sent < used;) {
        ssize_t written = write(1, out + sent, used - sent);
        if (written <= 0)
            exit(0);
        sent += (size_t)written;
    }
}

int main(int count, char **words)
{
    char *line = NULL;
    size_t size = 0;
    size_t list_bytes = count > 1 ? strtoul(words[1], NULL, 10) : 600;
    while (getline(&line, &size, stdin) > 0)
        answer(line, list_bytes);
    return 0;
}
