/* client.c and exchange.c against a fake daemon that does everything wrong. */
#include "check.h"
#include "client.h"
#include "clock.h"
#include "exchange.h"
#include "fake_daemon.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

static const struct request ask = {.op = "resolve", .uenv = "a", .uid = -1, .job = -1, .step = -1};
static const struct patience second = {.total_ms = 1000};

static int events_seen;

static void count_event(void *context, const struct progress *progress)
{
    (void)context;
    CHECK_TEXT(progress->message, "m");
    events_seen++;
}

/* Make one exchange and compare how it ends. */
static void expect(const struct settings *settings, struct patience patience, const char *code, const char *message_part)
{
    struct client client = CLIENT_CLOSED;
    struct reply reply;
    struct failure failure = FAILURE_NONE;
    int64_t start_ms = clock_ms();
    events_seen = 0;
    bool fine = exchange(&client, settings, &ask, patience, count_event, NULL, &reply, &failure);
    CHECK(fine == !code);
    CHECK_TEXT(failure.code, code);
    CHECK_IN(!code || strstr(failure_message(&failure), message_part), failure_message(&failure));
    CHECK(clock_ms() - start_ms < 4000);
    reply_free(&reply);
    failure_clear(&failure);
    client_close(&client);
}

static void expect_script(const struct act *script, struct patience patience, const char *code, const char *message_part)
{
    static struct fake_daemon daemon;
    daemon_start(&daemon, &script, 1);
    expect(&daemon.settings, patience, code, message_part);
    daemon_join(&daemon);
}

#define SCRIPT(...) ((const struct act[]){{.kind = ACT_REQUEST}, __VA_ARGS__, {.kind = ACT_END}})

TEST(answer_in_one_piece_in_bytes_and_after_events)
{
    expect_script(SCRIPT({.kind = ACT_SEND, .text = "{\"ok\":true}\n"}), second, NULL, NULL);
    expect_script(SCRIPT({.kind = ACT_SLOWLY, .text = "{\"event\":\"progress\",\"message\":\"m\"}\n{\"ok\":true}\n"}), second, NULL, NULL);
    CHECK(events_seen == 1);
    expect_script(SCRIPT({.kind = ACT_SEND, .text = "{\"event\":\"e\",\"message\":\"m\"}\n{\"event\":\"e\",\"message\":\"m\"}\n{\"ok\":true}\n{\"more\":1}\n"}), second, NULL, NULL);
    CHECK(events_seen == 2);
}

TEST(daemon_reports_an_error)
{
    expect_script(SCRIPT({.kind = ACT_SEND, .text = "{\"ok\":false,\"error\":{\"code\":\"unknown-label\",\"message\":\"no %s\"}}\n"}), second, "unknown-label", "no %s");
}

TEST(daemon_is_silent)
{
    struct patience brief = {.total_ms = 150};
    expect_script(SCRIPT({.kind = ACT_HOLD}), brief, CODE_TIMEOUT, "nothing came from");
    expect_script(SCRIPT({.kind = ACT_SEND, .text = "{\"ok\":"}, {.kind = ACT_HOLD}), brief, CODE_TIMEOUT, "in time");
    struct patience silence = {.silence_ms = 150};
    expect_script(SCRIPT({.kind = ACT_SEND, .text = "{\"event\":\"e\",\"message\":\"m\"}\n"}, {.kind = ACT_HOLD}), silence, CODE_TIMEOUT, "nothing came from");
    CHECK(events_seen == 1);
}

TEST(daemon_closes_early)
{
    expect_script(SCRIPT({.kind = ACT_SEND, .text = ""}), second, CODE_UNREACHABLE, "without an answer");
    expect_script(SCRIPT({.kind = ACT_SEND, .text = "{\"ok\":true"}), second, CODE_UNREACHABLE, "without an answer");
}

TEST(daemon_sends_garbage_or_too_much)
{
    expect_script(SCRIPT({.kind = ACT_SEND, .text = "\x01\x02\xff\n"}), second, CODE_PROTOCOL, "malformed");
    struct patience long_enough = {.total_ms = 3000};
    expect_script(SCRIPT({.kind = ACT_FILL, .count = MAX_REPLY_BYTES + 65536}), long_enough, CODE_PROTOCOL, "longer than 4194304 bytes");
}

TEST(nobody_listens)
{
    char path[108];
    snprintf(path, sizeof path, "%s/nobody", scratch_dir());
    struct settings settings = {.socket = path, .timeout_ms = 1000, .silence_ms = 1000, .peer_uid = geteuid()};
    expect(&settings, second, CODE_ABSENT, "No such file");
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, path);
    CHECK(bind(listener, (struct sockaddr *)&address, sizeof address) == 0);
    expect(&settings, second, CODE_ABSENT, "Connection refused");
    close(listener);
}

TEST(listener_never_accepts)
{
    char path[108];
    snprintf(path, sizeof path, "%s/full", scratch_dir());
    struct settings settings = {.socket = path, .timeout_ms = 1000, .silence_ms = 1000, .peer_uid = geteuid()};
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int listener = socket(AF_UNIX, SOCK_STREAM, 0), waiting[8], count = 0;
    strcpy(address.sun_path, path);
    CHECK(bind(listener, (struct sockaddr *)&address, sizeof address) == 0 && listen(listener, 0) == 0);
    do {
        waiting[count] = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
        CHECK(count < 7);
    } while (connect(waiting[count++], (struct sockaddr *)&address, sizeof address) == 0);
    struct patience brief = {.total_ms = 150};
    expect(&settings, brief, CODE_TIMEOUT, "");
    while (count)
        close(waiting[--count]);
    close(listener);
}

TEST(listener_is_somebody_else)
{
    const struct act *script = (const struct act[]){{.kind = ACT_HOLD}, {.kind = ACT_END}};
    static struct fake_daemon daemon;
    daemon_start(&daemon, &script, 1);
    daemon.settings.peer_uid = geteuid() + 1;
    expect(&daemon.settings, second, CODE_UNREACHABLE, "is not uenvd");
    daemon_join(&daemon);
}

static void no_action(int number)
{
    (void)number;
}

TEST(signals_interrupt_nothing)
{
    struct sigaction action = {.sa_handler = no_action}, old;
    struct itimerval often = {{0, 1000}, {0, 1000}}, never = {0};
    sigaction(SIGVTALRM, &action, NULL);
    sigaction(SIGALRM, &action, &old);
    unsigned int left = alarm(0);
    setitimer(ITIMER_REAL, &often, NULL);
    expect_script(SCRIPT({.kind = ACT_SLOWLY, .text = "{\"event\":\"e\",\"message\":\"m\"}\n{\"ok\":true}\n"}), second, NULL, NULL);
    struct patience brief = {.total_ms = 150};
    expect_script(SCRIPT({.kind = ACT_HOLD}), brief, CODE_TIMEOUT, "");
    setitimer(ITIMER_REAL, &never, NULL);
    sigaction(SIGALRM, &old, NULL);
    alarm(left);
}

/* Receive a frame with descriptors; return how many came, -1 on failure (then the code is checked). */
static int receive_fds(const struct act *script, const char *code)
{
    static struct fake_daemon daemon;
    daemon_start(&daemon, &script, 1);
    struct client client = CLIENT_CLOSED;
    struct reply reply;
    struct failure failure = FAILURE_NONE;
    int count = -1;
    if (exchange(&client, &daemon.settings, &ask, second, NULL, NULL, &reply, &failure)) {
        size_t received;
        int *fds = client_take_fds(&client, &received);
        for (size_t i = 0; i < received; i++)
            CHECK(fcntl(fds[i], F_GETFD) & FD_CLOEXEC);
        count = (int)received;
        close_fds(fds, received);
    }
    CHECK_TEXT(failure.code, code);
    reply_free(&reply);
    failure_clear(&failure);
    client_close(&client);
    daemon_join(&daemon);
    return count;
}

TEST(descriptors_arrive_whole_or_not_at_all)
{
    int many[253];
    for (size_t i = 0; i < 253; i++)
        many[i] = 0;
    CHECK(receive_fds(SCRIPT({.kind = ACT_SEND, .text = "{\"ok\":true}\n"}), NULL) == 0);
    CHECK(receive_fds(SCRIPT({.kind = ACT_SEND, .text = "{\"ok\":true}\n", .fds = many, .count = 1}), NULL) == 1);
    CHECK(receive_fds(SCRIPT({.kind = ACT_SEND, .text = "{\"ok\":true}\n", .fds = many, .count = 253}), NULL) == 253);
    CHECK(receive_fds(SCRIPT({.kind = ACT_SEND, .text = "{\"ok\":", .fds = many, .count = 253}, {.kind = ACT_SEND, .text = "true}\n", .fds = many, .count = 47}), NULL) == 300);
    CHECK(receive_fds(SCRIPT({.kind = ACT_SEND, .text = "garbage\n", .fds = many, .count = 9}), CODE_PROTOCOL) == -1);
    struct rlimit old, low;
    CHECK(getrlimit(RLIMIT_NOFILE, &old) == 0);
    low = old;
    low.rlim_cur = 40;
    CHECK(setrlimit(RLIMIT_NOFILE, &low) == 0);
    CHECK(receive_fds(SCRIPT({.kind = ACT_SEND, .text = "{\"ok\":true}\n", .fds = many, .count = 100}), CODE_MOUNT_FAILED) == -1);
    CHECK(setrlimit(RLIMIT_NOFILE, &old) == 0);
}

TEST(descriptors_are_not_lost_without_memory)
{
    int some[9] = {0};
    for (long at = 0; at < 40; at++) {
        static struct fake_daemon daemon;
        const struct act *script = SCRIPT({.kind = ACT_SEND, .text = "{\"ok\":true}\n", .fds = some, .count = 9});
        daemon_start(&daemon, &script, 1);
        struct client client = CLIENT_CLOSED;
        struct reply reply;
        struct failure failure = FAILURE_NONE;
        fail_allocation = at;
        bool fine = exchange(&client, &daemon.settings, &ask, second, NULL, NULL, &reply, &failure);
        bool injected = fail_allocation < 0;
        fail_allocation = -1;
        CHECK(fine != failure.set);
        reply_free(&reply);
        failure_clear(&failure);
        client_close(&client);
        daemon_cancel(&daemon);
        if (fine && !injected)
            return;
    }
    CHECK(false);
}
