#!/bin/busybox sh
# The start of the first program of a nested host. Loads KVM, and reports on the control port:
# "no-kvm REASON" where that fails, "ready" when the command starts. What is specific to a host
# follows.
busybox=/bin/busybox
$busybox --install -s /bin 2>/dev/null
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts -o ptmxmode=666 devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
ln -sf /proc/self/fd /dev/fd
for n in 0:stdin 1:stdout 2:stderr; do ln -sf /proc/self/fd/${n%:*} /dev/${n#*:}; done
ifconfig lo up

trouble=
while read -r module parameters; do
    insmod /modules/$module.ko $parameters 2>/tmp.log || trouble="$module: $(cat /tmp.log)"
done </modules/order

# Ports show up a moment after their driver.
read -r out err control </job/ports
i=0
while ! [ -e "$control" ] && [ $i -lt 100 ]; do
    i=$((i + 1))
    usleep 20000
done
exec 3>"$control"
if ! [ -e /dev/kvm ]; then
    echo "no-kvm $trouble" >&3
    exec poweroff -f
fi
chmod 666 /dev/kvm

# Runs a command to its end, and sets status.
run() {
    # Pipes instead of the ports themselves: a program may open /dev/stdout again, and should not
    # take a port for a terminal.
    mkfifo /out /err
    cat /out >"$out" &
    to_out=$!
    cat /err >"$err" &
    to_err=$!
    echo ready >&3
    "$@" </dev/null >/out 2>/err 3>&-
    status=$?
    # What the command leaves in the background may hold the pipes open.
    i=0
    while { kill -0 $to_out || kill -0 $to_err; } 2>/dev/null && [ $i -lt 100 ]; do
        i=$((i + 1))
        usleep 20000
    done
}
