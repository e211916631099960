/* Steps of jobs that were submitted where no uenvd runs: a node finds out what their labels mean. */
#include "check.h"
#include "choice.h"
#include "environ.h"
#include "spank_fake.h"
#include "step.h"

#include <slurm/slurm.h>

static const char RESOLVED[] = "{\"ok\":true,\"resolved\":\"app/1@sha256:aa:/m\"}\n";

static void knows_what_it_means(void)
{
    CHECK_TEXT(fake_getenv(VAR_IMAGES), "app/1@sha256:aa:/m");
    CHECK_TEXT(fake_getenv(VAR_SPEC), "app/1");
}

TEST(batch_script_is_told_what_its_node_found)
{
    if (!privileged())
        return;
    const struct act *scripts[] = {(const struct act[]){{.kind = ACT_REQUEST}, {.kind = ACT_SEND, .text = RESOLVED}, OFFER}};
    start_bare_step();
    fake.step = SLURM_BATCH_SCRIPT;
    fake.nodes = 4;
    prepare("listed", "ready", "[]");
    CHECK(ran(step_with(scripts, 1, "app/1", knows_what_it_means)));
    CHECK_TEXT(asked(0, "op"), "\"mount\"");
    CHECK_TEXT(asked(0, "uenv"), "\"app/1@sha256:aa:/m\"");
}

TEST(helper_step_only_looks_up)
{
    const struct act *scripts[] = {(const struct act[]){{.kind = ACT_REQUEST}, {.kind = ACT_SEND, .text = RESOLVED}, {.kind = ACT_END}}};
    start_bare_step();
    fake_setenv(VAR_SPEC, "app/1");
    fake_setenv(VAR_VIEW, "default");
    fake_setenv(VAR_LOOKUP, "1");
    CHECK(ran(step_with(scripts, 1, NULL, knows_what_it_means)));
    CHECK_TEXT(asked(0, "op"), "\"resolve\"");
    CHECK_TEXT(asked(0, "view"), "\"default\"");
    CHECK_TEXT(asked(0, "job"), "{\"id\":7,\"step\":0}");
    CHECK_TEXT(said, "");
    const struct act *refusing[] = {ANSWER("{\"ok\":false,\"error\":{\"code\":\"unknown-label\",\"message\":\"no\"}}\n")};
    CHECK(refused(step_with(refusing, 1, NULL, NULL)));
    CHECK_TEXT(said, "uenv: node9: no\n");
}

TEST(nodes_of_a_step_do_not_each_decide)
{
    start_bare_step();
    fake.nodes = 2;
    CHECK(refused(step_with(NULL, 0, "app/1", NULL)));
    CHECK_IN(strstr(said, "the nodes of a step may not each decide for themselves"), said);
    start_bare_step();
    fake.nodes = 2;
    check_wish("app/1@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef,/x.squashfs",
               "\"app/1@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef,/x.squashfs\"", NULL);
}
