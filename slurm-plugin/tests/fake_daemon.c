#include "fake_daemon.h"

#include "check.h"

#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static void send_all(int fd, const char *text, size_t length, const int *fds, size_t fd_count)
{
    union {
        char bytes[CMSG_SPACE(253 * sizeof(int))];
        struct cmsghdr align;
    } control = {0};
    struct iovec part = {.iov_base = (void *)(uintptr_t)text, .iov_len = length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (fd_count) {
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(fd_count * sizeof(int));
        memcpy(CMSG_DATA(header), fds, fd_count * sizeof(int));
    }
    ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
    while (sent >= 0 && (size_t)sent < length) {
        text += sent;
        length -= (size_t)sent;
        sent = send(fd, text, length, MSG_NOSIGNAL);
    }
}

static void read_request(struct fake_daemon *daemon, int number)
{
    char *line = daemon->requests[number];
    size_t used = 0;
    while (used + 1 < sizeof daemon->requests[0] && read(daemon->fds[number], line + used, 1) == 1 && line[used] != '\n')
        used++;
    line[used] = '\0';
    pthread_mutex_lock(&daemon->lock);
    daemon->request_count++;
    pthread_mutex_unlock(&daemon->lock);
}

static void play(struct fake_daemon *daemon, int number)
{
    const struct act *act = daemon->scripts[number];
    int fd = daemon->fds[number];
    char byte;
    for (; act->kind != ACT_END; act++) {
        switch (act->kind) {
        case ACT_REQUEST:
            read_request(daemon, number);
            break;
        case ACT_SEND:
            send_all(fd, act->text, strlen(act->text), act->fds, act->count);
            break;
        case ACT_SLOWLY:
            for (const char *c = act->text; *c; c++) {
                send_all(fd, c, 1, NULL, 0);
                usleep(500);
            }
            break;
        case ACT_FILL:
            for (size_t left = act->count; left;) {
                static char filler[65536];
                memset(filler, 'x', sizeof filler);
                ssize_t sent = send(fd, filler, left < sizeof filler ? left : sizeof filler, MSG_NOSIGNAL);
                if (sent < 0)
                    break;
                left -= (size_t)sent;
            }
            break;
        case ACT_HOLD:
            while (read(fd, &byte, 1) > 0)
                ;
            break;
        case ACT_END:
            break;
        }
    }
}

static void *play_part(void *argument)
{
    struct player *player = argument;
    play(player->daemon, player->number);
    close(player->daemon->fds[player->number]);
    return NULL;
}

static void *serve(void *argument)
{
    struct fake_daemon *daemon = argument;
    for (; daemon->accepted < daemon->script_count; daemon->accepted++) {
        int number = daemon->accepted;
        daemon->fds[number] = accept4(daemon->listener, NULL, NULL, SOCK_CLOEXEC);
        if (daemon->fds[number] < 0)
            break;
        daemon->players[number].daemon = daemon;
        daemon->players[number].number = number;
        CHECK(pthread_create(&daemon->players[number].thread, NULL, play_part, &daemon->players[number]) == 0);
    }
    return NULL;
}

void daemon_listen(struct fake_daemon *daemon, const struct act *const *scripts, int count)
{
    static char path[108];
    static int number;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    memset(daemon, 0, sizeof *daemon);
    CHECK(count <= MAX_CONNECTIONS);
    snprintf(path, sizeof path, "%s/s%d", scratch_dir(), number++);
    strcpy(address.sun_path, path);
    daemon->settings = (struct settings){.socket = path, .timeout_ms = 1000, .silence_ms = 1000, .peer_uid = geteuid()};
    for (int i = 0; i < count; i++)
        daemon->scripts[i] = scripts[i];
    daemon->script_count = count;
    CHECK(pthread_mutex_init(&daemon->lock, NULL) == 0);
    daemon->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(bind(daemon->listener, (struct sockaddr *)&address, sizeof address) == 0);
    CHECK(listen(daemon->listener, 1) == 0);
}

/* The threads inherit that no signal reaches them: none of their calls ends with EINTR. */
void daemon_serve(struct fake_daemon *daemon)
{
    sigset_t all, before;
    sigfillset(&all);
    CHECK(pthread_sigmask(SIG_SETMASK, &all, &before) == 0);
    CHECK(pthread_create(&daemon->thread, NULL, serve, daemon) == 0);
    CHECK(pthread_sigmask(SIG_SETMASK, &before, NULL) == 0);
}

void daemon_start(struct fake_daemon *daemon, const struct act *const *scripts, int count)
{
    daemon_listen(daemon, scripts, count);
    daemon_serve(daemon);
}

void daemon_join(struct fake_daemon *daemon)
{
    CHECK(pthread_join(daemon->thread, NULL) == 0);
    for (int i = 0; i < daemon->accepted; i++)
        CHECK(pthread_join(daemon->players[i].thread, NULL) == 0);
    close(daemon->listener);
}

void daemon_cancel(struct fake_daemon *daemon)
{
    shutdown(daemon->listener, SHUT_RDWR);
    daemon_join(daemon);
}
