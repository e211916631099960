# /etc/profile.d/zz-uenvd.csh, /etc/csh/login.d/zz-uenvd.csh (part of uenvd)
#
# csh and tcsh in a uenv session or job step: see zz-uenvd.sh, which does the work. A few short processes, and none anywhere else.

if ( $?UENV_RESTORE && -r /etc/profile.d/zz-uenvd.sh ) then
    if ( { grep -q ' - fuse[^ ]* uenvd:' /proc/self/mountinfo } ) then
        foreach _uenvd_name ( `printenv UENV_RESTORE | sed -e 's/=[^|]*//g' -e 's/[+|]/ /g'` )
            setenv $_uenvd_name "`/bin/sh -c '. /etc/profile.d/zz-uenvd.sh; printenv '$_uenvd_name`"
        end
        unset _uenvd_name
    endif
endif
