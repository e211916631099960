/* session.c: what is mounted, as the kernel's table says. */
#include "check.h"
#include "session.h"

#include <unistd.h>

static const char table[] =
    "22 1 0:21 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
    "40 22 0:50 / /user-environment ro,nosuid,nodev,relatime master:3 - fuse.uenvd uenvd:sha256:"
    "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef ro,user_id=0\n"
    "41 22 0:51 / /data rw,relatime - nfs4 server:/uenvd:x rw\n"
    "42 40 0:52 / /user-environment/a\\040b ro - fuse.uenvd uenvd:/home/ada/x.squashfs ro,user_id=0,group_id=0\n"
    "43 22 0:53 / /hidden ro - fuse.uenvd uenvd:sha256:aa ro,user_id=0\n"
    "44 22 0:54 / /hidden rw - tmpfs tmpfs rw\n"
    "45 22 0:55 / /forged rw - tmpfs uenvd:sha256:bb rw\n";

#define DIGEST "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

static void check_text_owned(char *text, const char *expected)
{
    CHECK_TEXT(text, expected);
    free(text);
}

TEST(mounted_images_are_found)
{
    struct session session;
    struct failure failure = FAILURE_NONE;
    CHECK(session_parse(table, &session, &failure));
    CHECK(session.count == 2);
    CHECK_TEXT(session.items[0].source, DIGEST);
    CHECK_TEXT(session.items[0].mount, "/user-environment");
    CHECK_TEXT(session.items[1].source, "/home/ada/x.squashfs");
    CHECK_TEXT(session.items[1].mount, "/user-environment/a b");
    check_text_owned(session_describe(&session), "@" DIGEST ":/user-environment,/home/ada/x.squashfs:/user-environment/a b");
    session_free(&session);
}

TEST(mounts_of_other_users_are_not_believed)
{
    /* What `fusermount3 -o fsname=uenvd:sha256:...` of somebody leaves in everybody's table. */
    const struct {
        const char *options;
        bool ours;
        unsigned owner;
    } cases[] = {
        {"rw,user_id=", true, 0},
        {"user_id=", true, getuid()},
        {"rw,user_id=", false, getuid() + 77},
        {"rw,group_id=", false, 0},
        {"rw,xuser_id=", false, 0},
        {"rw", false, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct session session;
        struct failure failure = FAILURE_NONE;
        char text[160];
        snprintf(text, sizeof text, "40 22 0:50 / /m ro - fuse.uenvd uenvd:x %s%u\n", cases[i].options, cases[i].owner);
        CHECK(session_parse(text, &session, &failure));
        CHECK_IN((session.count == 1) == cases[i].ours, text);
        session_free(&session);
    }
}

TEST(tables_without_images_or_sense)
{
    static const char *const texts[] = {"", "\n", "22 1 0:21 / / rw - ext4 /dev/sda1 rw\n", "x uenvd:", "1 2 3 4 /m r uenvd:x\n",
                                        "1 2 3 4 /m r - fuse\n uenvd:x", "1 2 3 4 /m r - fuse \n uenvd:x", "1 2 3 4 - fuse uenvd:x"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        struct session session;
        struct failure failure = FAILURE_NONE;
        CHECK(session_parse(texts[i], &session, &failure));
        CHECK_IN(session.count == 0, texts[i]);
        session_free(&session);
    }
    struct session here;
    struct failure failure = FAILURE_NONE;
    CHECK(session_read(&here, &failure));
    session_free(&here);
}

TEST(memory_runs_out_while_the_table_is_read)
{
    for (long allocation = 0;; allocation++) {
        struct session session;
        struct failure failure = FAILURE_NONE;
        fail_allocation = allocation;
        bool fine = session_parse(table, &session, &failure);
        bool all = fail_allocation >= 0;
        fail_allocation = -1;
        CHECK(fine == all && failure.set == !all);
        failure_clear(&failure);
        session_free(&session);
        if (all)
            break;
    }
}

TEST(variables_of_a_job_are_compared_with_the_mounts)
{
    static struct session_image images[] = {{(char *)DIGEST, (char *)"/user-environment"}, {(char *)"/x.squashfs", (char *)"/t"}};
    static const struct session both = {images, 2}, first = {images, 1};
    static const struct {
        const struct session *session;
        const char *images;
        bool matches;
    } cases[] = {
        {&first, "app/1:v1@demo%zen3@" DIGEST ":/user-environment", true},
        {&first, "@" DIGEST, true},
        {&first, "app/1@" DIGEST ",", true},
        {&first, "app/1@" DIGEST ":/elsewhere", false},
        {&first, "app/1@" DIGEST "0:/user-environment", false},
        {&first, "app/1", false},
        {&first, "", false},
        {&first, DIGEST, false},
        {&both, "app/1@" DIGEST ":/user-environment", false},
        {&both, "app/1@" DIGEST ":/user-environment,/x.squashfs:/t", true},
        {&both, "/x.squashfs,app/1@" DIGEST, true},
        {&both, "app/1@" DIGEST ":/user-environment,/x.squashfs:/u", false},
        {&both, "app/1@" DIGEST ":/user-environment,/x.squashfs.old:/t", false},
        {&both, "app/1@" DIGEST ",/x.squashfs:/t,other/1", false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        CHECK_IN(session_matches(cases[i].session, cases[i].images) == cases[i].matches, cases[i].images);
}

TEST(loaded_views_of_what_is_mounted)
{
    static struct session_image images[] = {{(char *)DIGEST, (char *)"/user-environment"}, {(char *)"/x.squashfs", (char *)"/t"}};
    static const struct session session = {images, 2};
    static const char *const cases[][2] = {
        {NULL, "none"},
        {"", "none"},
        {"/user-environment:app:default", "app:default"},
        {"/user-environment:app:default,/t:x:one,/t:x:two", "app:default,x:one,x:two"},
        {"/t::one", "one"},
        {"/gone:app:default", "none"},
        {"default", "none"},
        {"/t:default", "none"},
        {"/t:x:", "none"},
        {"/t:x y:z,/t:x:$(z),,/t:x:ok", "x:ok"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_text_owned(session_views(&session, cases[i][0]), cases[i][1]);
}
