/* The runner: each test in this process, with a check that it leaves no descriptor open. Usage: run-tests VECTORS_DIR [NAME]. */
#include "check.h"
#include "session.h"

#include <dirent.h>
#include <ftw.h>
#include <json-c/json.h>
#include <limits.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

const char *vectors_dir;
long fail_allocation = -1;
const char *mounted;

static struct test *tests;
static const char *skipped;
static const char *running = "";
static char scratch[80];

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *old, size_t size);
char *__real_strdup(const char *text);
char *__real_strndup(const char *text, size_t size);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_realloc(void *old, size_t size);
char *__wrap_strdup(const char *text);
char *__wrap_strndup(const char *text, size_t size);

static bool fails_now(void)
{
    return fail_allocation >= 0 && fail_allocation-- == 0;
}

void *__wrap_malloc(size_t size)
{
    return fails_now() ? NULL : __real_malloc(size);
}

void *__wrap_calloc(size_t count, size_t size)
{
    return fails_now() ? NULL : __real_calloc(count, size);
}

void *__wrap_realloc(void *old, size_t size)
{
    return fails_now() ? NULL : __real_realloc(old, size);
}

char *__wrap_strdup(const char *text)
{
    return fails_now() ? NULL : __real_strdup(text);
}

char *__wrap_strndup(const char *text, size_t size)
{
    return fails_now() ? NULL : __real_strndup(text, size);
}

bool __real_session_read(struct session *session, struct failure *failure);
bool __wrap_session_read(struct session *session, struct failure *failure);

bool __wrap_session_read(struct session *session, struct failure *failure)
{
    return mounted ? session_parse(mounted, session, failure) : __real_session_read(session, failure);
}

void test_register(struct test *test)
{
    test->next = tests;
    tests = test;
}

void test_skip(const char *reason)
{
    skipped = reason;
}

struct json_object *read_vectors(const char *name)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", vectors_dir, name);
    struct json_object *object = json_object_from_file(path);
    CHECK_IN(object != NULL, path);
    return object;
}

const char *scratch_dir(void)
{
    return scratch;
}

static int entries(const char *path)
{
    int count = 0;
    DIR *directory = opendir(path);
    CHECK_IN(directory != NULL, path);
    while (readdir(directory))
        count++;
    closedir(directory);
    return count;
}

static int open_descriptors(void)
{
    return entries("/proc/self/fd");
}

pid_t test_fork(void)
{
    CHECK(entries("/proc/self/task") == 3); /* ".", ".." and this thread */
    pid_t parent = getpid();
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0 && (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || getppid() != parent))
        _exit(127);
    return child;
}

static void time_is_up(int number)
{
    static const char before[] = "time is up in the test ", after[] = "\n";
    if (write(STDERR_FILENO, before, sizeof before - 1) < 0 || write(STDERR_FILENO, running, strlen(running)) < 0 ||
        write(STDERR_FILENO, after, sizeof after - 1) < 0)
        _exit(1);
    signal(number, SIG_DFL);
    raise(number);
}

static int remove_entry(const char *path, const struct stat *status, int kind, struct FTW *where)
{
    (void)status, (void)kind, (void)where;
    return remove(path);
}

int main(int argc, char **argv)
{
    int ran = 0;
    if (argc < 2) {
        fprintf(stderr, "usage: %s VECTORS_DIR [NAME]\n", argv[0]);
        return 2;
    }
    vectors_dir = argv[1];
    signal(SIGPIPE, SIG_DFL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    signal(SIGALRM, time_is_up);
    alarm(120);
    const char *temporary = getenv("TMPDIR");
    int length = snprintf(scratch, sizeof scratch, "%s/uenvd-plugin-XXXXXX", temporary ? temporary : "/tmp");
    CHECK(length > 0 && (size_t)length < sizeof scratch && mkdtemp(scratch) != NULL);
    for (struct test *test = tests; test; test = test->next) {
        if (argc > 2 && !strstr(test->name, argv[2]))
            continue;
        int before = open_descriptors();
        skipped = NULL;
        running = test->name;
        test->run();
        fail_allocation = -1;
        mounted = NULL;
        CHECK_IN(open_descriptors() == before, test->name);
        printf("%s %s%s%s\n", skipped ? "skip" : "ok  ", test->name, skipped ? ": " : "", skipped ? skipped : "");
        ran++;
    }
    nftw(scratch, remove_entry, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
    printf("%d tests\n", ran);
    return ran ? 0 : 1;
}
