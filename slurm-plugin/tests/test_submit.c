/* The hooks as srun and sbatch call them. */
#include "check.h"
#include "choice.h"
#include "fake_daemon.h"
#include "lookup.h"
#include "session.h"
#include "spank_fake.h"

#include <errno.h>
#include <json-c/json.h>
#include <sys/mman.h>
#include <unistd.h>

int slurm_spank_init(spank_t spank, int argc, char *argv[]);
int slurm_spank_init_post_opt(spank_t spank, int argc, char *argv[]);
int slurm_spank_exit(spank_t spank, int argc, char *argv[]);

static struct fake_daemon daemon_;
static char said[8192];

static const struct act resolves[] = {{.kind = ACT_REQUEST},
                                      {.kind = ACT_SEND, .text = "{\"ok\":true,\"resolved\":\"app/1@sha256:aa:/m\",\"notes\":[\"a note\"]}\n"},
                                      {.kind = ACT_END}};
static const struct act refuses[] = {{.kind = ACT_REQUEST},
                                     {.kind = ACT_SEND, .text = "{\"ok\":false,\"error\":{\"code\":\"unknown-label\",\"message\":\"no\",\"hint\":\"h\"}}\n"},
                                     {.kind = ACT_END}};

static void clear_environment(void)
{
    static const char *const names[] = {VAR_SPEC,      VAR_IMAGES, VAR_VIEW,    VAR_OPTION_UENV, VAR_OPTION_VIEW, VAR_INSTEAD_OF,
                                        VAR_SRUN_UENV, VAR_SRUN_VIEW, VAR_NOTED, VAR_LOOKUP,  VAR_SESSION,     "SBATCH_UENV",   "SBATCH_UENV_VIEW",
                                        "SLURM_VIEW"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        unsetenv(names[i]);
}

static char site_argument[64] = "login=required";

static void begin(spank_context_t context, const struct act *script)
{
    static char socket_argument[200], peer[32];
    fake_reset(context);
    fake.log_fd = memfd_create("log", MFD_CLOEXEC);
    daemon_start(&daemon_, &script, script ? 1 : 0);
    snprintf(socket_argument, sizeof socket_argument, "socket=%s", daemon_.settings.socket);
    snprintf(peer, sizeof peer, "peer_uid=%u", geteuid());
    char *arguments[] = {socket_argument, peer, site_argument};
    CHECK(slurm_spank_init(NULL, 3, arguments) == 0);
    CHECK(fake.option_count == 2);
}

/* Options as Slurm hands them over for a component: first those that the environment holds, then those typed. NULL: not given. */
static int component(const char *uenv, const char *view)
{
    const char *exported_uenv = getenv(VAR_OPTION_UENV), *exported_view = getenv(VAR_OPTION_VIEW);
    if (exported_uenv)
        CHECK(fake_option("uenv", exported_uenv) == 0);
    if (exported_view)
        CHECK(fake_option("view", exported_view) == 0);
    if (uenv)
        CHECK(fake_option("uenv", uenv) == 0);
    if (view)
        CHECK(fake_option("view", view) == 0);
    return slurm_spank_init_post_opt(NULL, 0, NULL);
}

static void end(void)
{
    CHECK(slurm_spank_exit(NULL, 0, NULL) == 0);
    daemon_cancel(&daemon_);
    ssize_t length = pread(fake.log_fd, said, sizeof said - 1, 0);
    CHECK(length >= 0);
    said[length] = '\0';
    close(fake.log_fd);
}

static int submit(spank_context_t context, const struct act *script, const char *uenv, const char *view)
{
    begin(context, script);
    int result = component(uenv, view);
    end();
    return result;
}

static const char *asked(const char *key)
{
    static char text[1024];
    struct json_object *frame = json_tokener_parse(daemon_.requests[0]), *value;
    bool found = frame && json_object_object_get_ex(frame, key, &value);
    if (found)
        snprintf(text, sizeof text, "%s", json_object_get_string(value));
    json_object_put(frame);
    return found ? text : NULL;
}

static void check_exported(const char *spec, const char *images, const char *view)
{
    CHECK_TEXT(getenv(VAR_SPEC), spec);
    CHECK_TEXT(getenv(VAR_IMAGES), images);
    CHECK_TEXT(getenv(VAR_VIEW), view);
    CHECK_TEXT(getenv(VAR_OPTION_VIEW), view);
}

TEST(no_option_no_request)
{
    clear_environment();
    CHECK(submit(S_CTX_LOCAL, NULL, NULL, NULL) == 0);
    CHECK(daemon_.request_count == 0);
    check_exported(NULL, NULL, NULL);
    CHECK_TEXT(said, "");
}

TEST(resolved_at_submission)
{
    static const spank_context_t contexts[] = {S_CTX_LOCAL, S_CTX_ALLOCATOR};
    for (size_t i = 0; i < 2; i++) {
        clear_environment();
        CHECK(submit(contexts[i], resolves, "app/1", "default") == 0);
        CHECK_TEXT(asked("uenv"), "app/1");
        CHECK_TEXT(asked("view"), "default");
        CHECK_TEXT(asked("submit"), "true");
        char *here = getcwd(NULL, 0);
        CHECK_TEXT(asked("cwd"), here);
        free(here);
        check_exported("app/1", "app/1@sha256:aa:/m", "default");
        CHECK_TEXT(getenv(VAR_OPTION_UENV), "app/1");
        CHECK_TEXT(said, "uenv: a note\n");
    }
}

TEST(refused_at_submission)
{
    clear_environment();
    CHECK(submit(S_CTX_LOCAL, refuses, "nope", NULL) == -1);
    CHECK_TEXT(said, "uenv: no\nuenv: hint: h\n");
    check_exported(NULL, NULL, NULL);
}

TEST(last_option_counts)
{
    clear_environment();
    setenv(VAR_OPTION_UENV, "from-the-users-profile", 1);
    CHECK(submit(S_CTX_LOCAL, resolves, "app/1", NULL) == 0);
    CHECK_TEXT(asked("uenv"), "app/1");
}

static void inherit(const char *view)
{
    clear_environment();
    setenv(VAR_SPEC, "app/1", 1);
    setenv(VAR_IMAGES, "app/1@sha256:old:/m", 1);
    setenv(VAR_OPTION_UENV, "app/1", 1);
    if (view) {
        setenv(VAR_VIEW, view, 1);
        setenv(VAR_OPTION_VIEW, view, 1);
    }
}

TEST(inherited_image_is_not_asked_for_again)
{
    inherit("default");
    CHECK(submit(S_CTX_LOCAL, NULL, NULL, NULL) == 0);
    check_exported("app/1", "app/1@sha256:old:/m", "default");
    CHECK(submit(S_CTX_LOCAL, NULL, "app/1", NULL) == 0);
    CHECK(submit(S_CTX_LOCAL, NULL, "app/1", "default") == 0);
    check_exported("app/1", "app/1@sha256:old:/m", "default");
    unsetenv(VAR_OPTION_UENV);
    unsetenv(VAR_OPTION_VIEW);
    CHECK(submit(S_CTX_LOCAL, NULL, NULL, NULL) == 0);
    CHECK_TEXT(getenv(VAR_IMAGES), "app/1@sha256:old:/m");
    CHECK(submit(S_CTX_LOCAL, NULL, "app/1", NULL) == 0);
    check_exported("app/1", "app/1@sha256:old:/m", "default");
}

TEST(another_view_of_the_inherited_image)
{
    inherit("default");
    CHECK(submit(S_CTX_LOCAL, resolves, NULL, "develop") == 0);
    CHECK_TEXT(asked("uenv"), "app/1@sha256:old:/m");
    CHECK_TEXT(asked("view"), "develop");
    check_exported("app/1", "app/1@sha256:aa:/m", "develop");
}

TEST(another_image_drops_the_inherited_view)
{
    inherit("default");
    CHECK(submit(S_CTX_LOCAL, resolves, "other", NULL) == 0);
    CHECK_TEXT(asked("uenv"), "other");
    CHECK_TEXT(asked("view"), NULL);
    check_exported("other", "app/1@sha256:aa:/m", NULL);
    CHECK_TEXT(getenv(VAR_OPTION_UENV), "other");
    inherit("default");
    CHECK(submit(S_CTX_LOCAL, resolves, "other", "default") == 0);
    CHECK_TEXT(asked("view"), "default");
}

TEST(relative_path_is_asked_for_again_when_typed)
{
    inherit(NULL);
    setenv(VAR_SPEC, "a,./x.squashfs", 1);
    setenv(VAR_OPTION_UENV, "a,./x.squashfs", 1);
    CHECK(submit(S_CTX_LOCAL, NULL, NULL, NULL) == 0);
    CHECK(daemon_.request_count == 0);
    CHECK(submit(S_CTX_LOCAL, resolves, "a,./x.squashfs", NULL) == 0);
    CHECK(daemon_.request_count == 1);
}

TEST(none_drops_everything)
{
    inherit("default");
    CHECK(submit(S_CTX_LOCAL, NULL, "none", NULL) == 0);
    check_exported("none", NULL, NULL);
    CHECK_TEXT(getenv(VAR_OPTION_UENV), "none");
    CHECK(submit(S_CTX_ALLOCATOR, NULL, NULL, NULL) == 0);
    CHECK(submit(S_CTX_LOCAL, NULL, NULL, "default") == -1);
    CHECK_TEXT(said, "uenv: --uenv=none has no views\nuenv: hint: leave out --view, or name an image\n");
}

TEST(view_without_image)
{
    clear_environment();
    CHECK(submit(S_CTX_ALLOCATOR, NULL, NULL, "default") == -1);
    CHECK_TEXT(said, "uenv: --view needs an image\nuenv: hint: add --uenv=LABEL\n");
}

TEST(list_too_long_for_an_environment)
{
    static char answer[140000] = "{\"ok\":true,\"resolved\":\"";
    size_t used = strlen(answer);
    memset(answer + used, 'x', 135000);
    strcpy(answer + used + 135000, "\"}\n");
    const struct act script[] = {{.kind = ACT_REQUEST}, {.kind = ACT_SEND, .text = answer}, {.kind = ACT_END}};
    clear_environment();
    CHECK(submit(S_CTX_LOCAL, script, "app/1", NULL) == -1);
    CHECK(strstr(said, "too long for a job's environment"));
}

/* sbatch reads the directives of the script before the variable. */
TEST(directive_of_a_script_replaces_what_is_inherited)
{
    inherit("default");
    begin(S_CTX_ALLOCATOR, resolves);
    CHECK(fake_option("uenv", "app/2") == 0);
    CHECK(component(NULL, NULL) == 0);
    end();
    CHECK_TEXT(asked("uenv"), "app/2");
    CHECK_TEXT(asked("view"), NULL);
    CHECK_TEXT(getenv(VAR_INSTEAD_OF), "app/1");
    clear_environment();
    begin(S_CTX_ALLOCATOR, resolves);
    CHECK(fake_option("uenv", "app/1") == 0);
    CHECK(component(NULL, NULL) == 0);
    CHECK(fake_option("uenv", "app/2") == 0);
    CHECK(component(NULL, NULL) == -1);
    end();
}

TEST(other_contexts_do_nothing)
{
    static const spank_context_t contexts[] = {S_CTX_SLURMD, S_CTX_JOB_SCRIPT, S_CTX_ERROR};
    char *arguments[] = {"nonsense"};
    for (size_t i = 0; i < sizeof contexts / sizeof *contexts; i++) {
        fake_reset(contexts[i]);
        CHECK(slurm_spank_init(NULL, 1, arguments) == 0);
        CHECK(slurm_spank_init_post_opt(NULL, 1, arguments) == 0);
        CHECK(slurm_spank_exit(NULL, 1, arguments) == 0);
        CHECK(fake.option_count == 0);
    }
}

/* ---- variables of the user */

TEST(variables_choose_where_no_option_does)
{
    clear_environment();
    setenv(VAR_SRUN_UENV, "by-variable", 1);
    setenv(VAR_SRUN_VIEW, "v", 1);
    CHECK(submit(S_CTX_LOCAL, resolves, NULL, NULL) == 0);
    CHECK_TEXT(asked("uenv"), "by-variable");
    CHECK_TEXT(asked("view"), "v");
    check_exported("by-variable", "app/1@sha256:aa:/m", "v");
    CHECK_TEXT(getenv(VAR_OPTION_UENV), "by-variable");
    clear_environment();
    setenv(VAR_SRUN_UENV, "by-variable", 1);
    setenv(VAR_SRUN_VIEW, "v", 1);
    CHECK(submit(S_CTX_LOCAL, resolves, "typed", NULL) == 0);
    CHECK_TEXT(asked("uenv"), "typed");
    CHECK_TEXT(asked("view"), NULL);
    clear_environment();
    setenv(VAR_SRUN_UENV, "of-srun", 1);
    CHECK(submit(S_CTX_ALLOCATOR, NULL, NULL, NULL) == 0);
    check_exported(NULL, NULL, NULL);
    setenv("SBATCH_UENV", "of-sbatch", 1);
    CHECK(submit(S_CTX_ALLOCATOR, resolves, NULL, NULL) == 0);
    CHECK_TEXT(asked("uenv"), "of-sbatch");
    CHECK_TEXT(getenv(VAR_SRUN_UENV), "of-sbatch");
    clear_environment();
    setenv("SLURM_VIEW", "v", 1);
    CHECK(submit(S_CTX_LOCAL, NULL, NULL, NULL) == 0);
}

TEST(variable_goes_before_what_a_job_passes_on)
{
    inherit("default");
    setenv(VAR_SRUN_UENV, "app/1", 1); /* what the plugin left there itself */
    CHECK(submit(S_CTX_LOCAL, NULL, NULL, NULL) == 0);
    check_exported("app/1", "app/1@sha256:old:/m", "default");
    setenv(VAR_SRUN_UENV, "mine", 1);
    CHECK(submit(S_CTX_LOCAL, resolves, NULL, NULL) == 0);
    CHECK_TEXT(asked("uenv"), "mine");
    CHECK_TEXT(asked("view"), "default"); /* the variables belong together */
    CHECK_TEXT(getenv(VAR_INSTEAD_OF), "app/1");
    /* Slurm itself goes on exporting its option with the old value. */
    setenv(VAR_OPTION_UENV, "app/1", 1);
    CHECK(submit(S_CTX_LOCAL, NULL, NULL, NULL) == 0);
    check_exported("mine", "app/1@sha256:aa:/m", "default");
    setenv(VAR_OPTION_UENV, "app/1", 1);
    setenv(VAR_SRUN_UENV, "none", 1);
    CHECK(submit(S_CTX_LOCAL, NULL, NULL, NULL) == 0);
    check_exported("none", NULL, NULL);
}

/* ---- in a session */

#define DIGITS "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
#define OTHER_DIGITS "fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210"

static const char one_mounted[] = "40 22 0:50 / /m ro - fuse.uenvd uenvd:sha256:" DIGITS " ro,user_id=0\n";
static const char other_mounted[] = "40 22 0:50 / /m ro - fuse.uenvd uenvd:sha256:" OTHER_DIGITS " ro,user_id=0\n";

/* The program decides between salloc and sbatch by its own name. */
static int allocate(const char *program, const struct act *script, const char *uenv)
{
    char *name = program_invocation_short_name;
    program_invocation_short_name = (char *)program;
    int result = submit(S_CTX_ALLOCATOR, script, uenv, NULL);
    program_invocation_short_name = name;
    return result;
}

TEST(session_is_inherited_by_what_is_started_in_it)
{
    clear_environment();
    mounted = one_mounted;
    CHECK(submit(S_CTX_LOCAL, resolves, NULL, NULL) == 0);
    CHECK_TEXT(asked("uenv"), "@sha256:" DIGITS ":/m");
    CHECK_TEXT(getenv(VAR_SESSION), NULL);
    clear_environment();
    CHECK(allocate("salloc", resolves, NULL) == 0);
    CHECK(strstr(said, "uenv: inherited from this session: "));
}

TEST(what_salloc_was_given_counts_in_its_shell)
{
    static const char *const given[] = {"other", "none"};
    for (size_t i = 0; i < 2; i++) {
        clear_environment();
        mounted = one_mounted;
        CHECK(allocate("salloc", i ? NULL : resolves, given[i]) == 0);
        char *here = session_place();
        CHECK_TEXT(getenv(VAR_SESSION), here);
        free(here);
        CHECK(submit(S_CTX_LOCAL, NULL, NULL, NULL) == 0);
        CHECK(daemon_.request_count == 0);
        check_exported(given[i], i ? NULL : "app/1@sha256:aa:/m", NULL);
        /* A job of the job's. */
        CHECK(allocate("salloc", NULL, NULL) == 0);
        check_exported(given[i], i ? NULL : "app/1@sha256:aa:/m", NULL);
        /* A session that was started in the allocation is another place, whatever is mounted in it. */
        setenv(VAR_SESSION, "elsewhere/1", 1);
        mounted = i ? one_mounted : other_mounted;
        CHECK(submit(S_CTX_LOCAL, resolves, NULL, NULL) == 0);
        CHECK_TEXT(asked("uenv"), i ? "@sha256:" DIGITS ":/m" : "@sha256:" OTHER_DIGITS ":/m");
    }
}

TEST(place_of_submission_is_left_to_the_shell_of_salloc_alone)
{
    clear_environment();
    mounted = one_mounted;
    CHECK(allocate("salloc", resolves, "other") == 0);
    CHECK(getenv(VAR_SESSION) != NULL);
    CHECK(allocate("sbatch", NULL, NULL) == 0);
    CHECK_TEXT(getenv(VAR_SESSION), NULL);
    CHECK(allocate("salloc", resolves, "app/2") == 0);
    mounted = "22 1 0:21 / / rw - ext4 /dev/sda1 rw\n";
    CHECK(allocate("salloc", resolves, "other") == 0);
    CHECK_TEXT(getenv(VAR_SESSION), NULL);
    /* Without a job there is nothing that could count before the session. */
    clear_environment();
    char *here = session_place();
    setenv(VAR_SESSION, here, 1);
    free(here);
    mounted = one_mounted;
    CHECK(submit(S_CTX_LOCAL, resolves, NULL, NULL) == 0);
    CHECK_TEXT(asked("uenv"), "@sha256:" DIGITS ":/m");
    clear_environment();
}

/* ---- heterogeneous jobs */

TEST(components_may_not_differ)
{
    static const struct {
        const char *first, *first_view, *second, *second_view, *said;
    } cases[] = {
        {"app/1", NULL, "app/1", NULL, NULL},
        {"app/1", NULL, NULL, NULL, NULL},
        {"app/1", "v", "app/1", "v", NULL},
        {"none", NULL, "none", NULL, NULL},
        {NULL, NULL, NULL, NULL, NULL},
        {"app/1", NULL, "app/2", NULL, "the first has --uenv=app/1, another --uenv=app/2"},
        {"app/1", NULL, "none", NULL, "the first has --uenv=app/1, another --uenv=none"},
        {NULL, NULL, "app/2", NULL, "the first has no --uenv, another --uenv=app/2"},
        {"app/1", "v", "app/1", "w", "the first has --view=v, another --view=w"},
        {"app/1", NULL, NULL, "w", "the first has no --view, another --view=w"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        clear_environment();
        begin(i % 2 ? S_CTX_LOCAL : S_CTX_ALLOCATOR, cases[i].first ? resolves : NULL);
        CHECK(component(cases[i].first, cases[i].first_view) == 0);
        CHECK((component(cases[i].second, cases[i].second_view) == 0) == !cases[i].said);
        end();
        CHECK_IN(!cases[i].said || strstr(said, cases[i].said), said);
        CHECK_TEXT(getenv(VAR_SPEC), cases[i].first);
    }
}

/* ---- without uenvd here */

static int submit_without_daemon(spank_context_t context, const char *uenv, const char *view)
{
    static char nowhere[] = "socket=/nonexistent/uenvd";
    char *arguments[] = {nowhere, site_argument};
    fake_reset(context);
    fake.log_fd = memfd_create("log", MFD_CLOEXEC);
    CHECK(slurm_spank_init(NULL, 2, arguments) == 0);
    daemon_start(&daemon_, NULL, 0);
    int result = component(uenv, view);
    end();
    return result;
}

TEST(first_node_decides_where_the_site_says_so)
{
    clear_environment();
    CHECK(submit_without_daemon(S_CTX_ALLOCATOR, "app/1", "v") == -1);
    CHECK(strstr(said, "uenvd is not running"));
    check_exported(NULL, NULL, NULL);
    strcpy(site_argument, "login=optional");
    CHECK(submit_without_daemon(S_CTX_ALLOCATOR, "app/1", "v") == 0);
    CHECK_TEXT(said, "uenv: no uenvd here: the job's first node looks app/1 up\n");
    check_exported("app/1", NULL, "v");
    /* An srun of this job, on a node with uenvd. */
    CHECK(submit(S_CTX_LOCAL, resolves, NULL, NULL) == 0);
    CHECK_TEXT(asked("uenv"), "app/1");
    CHECK_TEXT(asked("view"), "v");
    clear_environment();
    CHECK(submit(S_CTX_LOCAL, refuses, "app/1", NULL) == -1);
    strcpy(site_argument, "login=required");
}

TEST(helper_has_no_options_but_its_own)
{
    char *before[] = {"PATH=/bin",          "SLURM_UENVD_SPEC=a", "SLURM_LABELIO=1", "SRUN_EXPORT_ENV=NONE", "SLURM_CONF=/c",
                      "_SLURM_SPANK_OPTION_uenvd_uenv=a", "HOME=/h", NULL};
    char **after = lookup_environment(before);
    const char *expected[] = {"PATH=/bin", "SLURM_UENVD_SPEC=a", "SLURM_CONF=/c", "HOME=/h", "SLURM_UENVD_LOOKUP=1", NULL};
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
        CHECK_TEXT(after[i], expected[i]);
    free(after);
    clear_environment();
    setenv(VAR_LOOKUP, "1", 1);
    setenv(VAR_SPEC, "app/1", 1);
    CHECK(submit(S_CTX_LOCAL, NULL, NULL, NULL) == 0);
    check_exported("app/1", NULL, NULL);
    clear_environment();
}

TEST(memory_runs_out_at_submission)
{
    for (long allocation = 0; allocation < 1000; allocation++) {
        clear_environment();
        begin(S_CTX_LOCAL, resolves);
        fail_allocation = allocation;
        int result = component("app/1", "v");
        bool all = fail_allocation >= 0;
        fail_allocation = -1;
        end();
        CHECK_IN(result == (all ? 0 : result), said);
        if (result == 0)
            check_exported("app/1", "app/1@sha256:aa:/m", "v"); /* a note may be missing, the environment not */
        else
            CHECK_IN(strstr(said, "out of memory") || !*said, said);
        if (all)
            break;
    }
}
