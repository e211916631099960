# /usr/share/fish/vendor_conf.d/zz-uenvd.fish (part of uenvd)
#
# fish in a uenv session or job step: the same as zz-uenvd.sh, for login shells.

if set -q UENV_RESTORE; and status is-login; and command grep -q ' - fuse[^ ]* uenvd:' /proc/self/mountinfo 2>/dev/null
    for record in (string split '|' -- $UENV_RESTORE)
        set -l parts (string split --max 1 = -- $record)
        set -l name (string replace --regex '\+$' '' -- $parts[1])
        string match --quiet --regex '^[A-Za-z_][A-Za-z0-9_]*$' -- $name; or continue
        # quoted, so that a list of fish (PATH) and a text of others look alike
        set -l there (string split --no-empty : -- "$$name")
        set -l missing
        for element in (string split --no-empty : -- $parts[2])
            contains -- $element $there $missing; or set --append missing $element
        end
        set -q missing[1]; or continue
        if string match --quiet '*+' -- $parts[1]
            set -gx $name (string join : -- $there $missing)
        else
            set -gx $name (string join : -- $missing $there)
        end
    end
end
