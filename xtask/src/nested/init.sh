#!/bin/busybox sh
# The start of the first program of a nested host. Loads KVM, and reports on the control port:
# "no-kvm REASON" where that fails. What is specific to a host follows.
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
control=$(cat /job/control)
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
