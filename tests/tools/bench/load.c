/* A load generator that is faster than what it measures: one thread, epoll, one request under way on each kept connection.
 *
 *   load HOST PORT CALLS SECONDS < requests
 *
 * Standard input: for each connection a decimal length, a newline, and that many bytes: the whole HTTP request it repeats.
 * It ends after CALLS answers or SECONDS, whichever is first, and prints one JSON object: calls, errors (a status other than 200, a body
 * without "result", a connection that ended in mid-answer), seconds, calls_per_s, p50_ms, p99_ms, max_ms.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEAD, LENGTH, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER };
enum { KEPT = 65536 };

struct connection {
    int fd;
    char *request;
    size_t size;
    double started;
    int state;
    int status;
    int close;
    uint64_t left;
    char head[16384];
    size_t head_size;
    char line[64];
    size_t line_size;
    char body[KEPT + 1];
    size_t body_size;
};

static struct sockaddr_in address;
static int poller;
static long wanted, calls, errors;
static float *taken;

static double now(void)
{
    struct timespec moment;
    clock_gettime(CLOCK_MONOTONIC, &moment);
    return (double)moment.tv_sec + (double)moment.tv_nsec / 1e9;
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void connect_to(struct connection *c)
{
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&address, sizeof address) < 0)
        fail("connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event) < 0)
        fail("epoll_ctl");
}

static void send_request(struct connection *c)
{
    c->state = HEAD;
    c->head_size = c->body_size = c->line_size = 0;
    c->close = 0;
    c->started = now();
    for (size_t sent = 0; sent < c->size;) {
        ssize_t done = send(c->fd, c->request + sent, c->size - sent, MSG_NOSIGNAL);
        if (done < 0)
            fail("send");
        sent += (size_t)done;
    }
}

static void answered(struct connection *c, int good)
{
    c->body[c->body_size] = 0;
    if (!good || c->status != 200 || !memmem(c->body, c->body_size, "\"result\"", 8)) {
        if (!errors++)
            fprintf(stderr, "status %d: %.300s\n", c->status, c->body);
    }
    taken[calls++] = (float)((now() - c->started) * 1e3);
    if (c->close || !good) {
        close(c->fd);
        connect_to(c);
    }
    if (calls < wanted)
        send_request(c);
}

static void keep(struct connection *c, const char *data, size_t size)
{
    size_t room = KEPT - c->body_size;
    size = size < room ? size : room;
    memcpy(c->body + c->body_size, data, size);
    c->body_size += size;
}

static void read_head(struct connection *c)
{
    c->head[c->head_size] = 0;
    c->status = atoi(c->head + 9);
    c->close = strcasestr(c->head, "\r\nconnection: close") != NULL;
    char *length = strcasestr(c->head, "\r\ncontent-length:");
    if (strcasestr(c->head, "\r\ntransfer-encoding: chunked")) {
        c->state = CHUNK_SIZE;
    } else {
        c->state = LENGTH;
        c->left = length ? strtoull(length + 17, NULL, 10) : 0;
    }
}

/* Takes bytes of an answer; 1 when it is whole. */
static int take(struct connection *c, const char *data, size_t size)
{
    size_t at = 0;
    while (at < size || (c->state == LENGTH && !c->left)) {
        size_t rest = size - at;
        if (c->state == HEAD) {
            if (c->head_size + 1 >= sizeof c->head)
                fail("the header is too long");
            c->head[c->head_size++] = data[at++];
            if (c->head_size >= 4 && !memcmp(c->head + c->head_size - 4, "\r\n\r\n", 4))
                read_head(c);
        } else if (c->state == LENGTH || c->state == CHUNK_DATA) {
            size_t part = rest < c->left ? rest : (size_t)c->left;
            keep(c, data + at, part);
            at += part;
            c->left -= part;
            if (!c->left && c->state == LENGTH)
                return 1;
            if (!c->left)
                c->state = CHUNK_END;
        } else {
            char byte = data[at++];
            if (byte == '\r')
                continue;
            if (byte != '\n') {
                if (c->line_size + 1 < sizeof c->line)
                    c->line[c->line_size++] = byte;
                continue;
            }
            c->line[c->line_size] = 0;
            size_t length = c->line_size;
            c->line_size = 0;
            if (c->state == CHUNK_END) {
                c->state = CHUNK_SIZE;
            } else if (c->state == CHUNK_SIZE) {
                c->left = strtoull(c->line, NULL, 16);
                c->state = c->left ? CHUNK_DATA : TRAILER;
            } else if (length == 0) {
                return 1;
            }
        }
    }
    return 0;
}

static int by_size(const void *a, const void *b)
{
    float left = *(const float *)a, right = *(const float *)b;
    return (left > right) - (left < right);
}

int main(int count, char **words)
{
    static char data[1 << 18];
    if (count != 5) {
        fprintf(stderr, "usage: load HOST PORT CALLS SECONDS < requests\n");
        return 2;
    }
    address.sin_family = AF_INET;
    inet_pton(AF_INET, words[1], &address.sin_addr);
    address.sin_port = htons((uint16_t)atoi(words[2]));
    wanted = atol(words[3]);
    double limit = atof(words[4]);
    taken = malloc(sizeof *taken * (size_t)(wanted + 4096));
    poller = epoll_create1(0);
    struct connection **all = NULL;
    size_t connections = 0, length;
    while (scanf("%zu", &length) == 1) {
        getchar();
        struct connection *c = calloc(1, sizeof *c);
        c->request = malloc(length);
        c->size = fread(c->request, 1, length, stdin);
        all = realloc(all, sizeof *all * ++connections);
        all[connections - 1] = c;
        connect_to(c);
    }
    double started = now();
    for (size_t each = 0; each < connections && (long)each < wanted; each++)
        send_request(all[each]);
    while (calls < wanted && now() - started < limit) {
        struct epoll_event events[256];
        int ready = epoll_wait(poller, events, 256, 100);
        for (int each = 0; each < ready && calls < wanted; each++) {
            struct connection *c = events[each].data.ptr;
            ssize_t size = recv(c->fd, data, sizeof data, MSG_DONTWAIT);
            if (size < 0 && errno == EAGAIN)
                continue;
            if (size <= 0)
                answered(c, 0);
            else if (take(c, data, (size_t)size))
                answered(c, 1);
        }
    }
    double seconds = now() - started;
    if (!calls) {
        fprintf(stderr, "no answer\n");
        return 1;
    }
    qsort(taken, (size_t)calls, sizeof *taken, by_size);
    printf("{\"calls\": %ld, \"errors\": %ld, \"seconds\": %.4f, \"calls_per_s\": %.1f, \"p50_ms\": %.4f, \"p99_ms\": %.4f, "
           "\"max_ms\": %.4f}\n",
           calls, errors, seconds, (double)calls / seconds, taken[calls / 2], taken[calls * 99 / 100], taken[calls - 1]);
    return 0;
}
