/* srun, as the user. It blocks SIGINT and SIGTERM in its callbacks: everything here ends by a deadline. */
#include "contexts.h"
#include "submit.h"

int local_init_post_opt(const struct plugin *plugin, const struct choice *choice)
{
    return submit_resolve(plugin, choice) ? 0 : -1;
}
