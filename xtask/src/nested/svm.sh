
# A host with SVM: this machine's files by 9p, and virtio ports. Runs /job/command, and reports
# "no-files REASON", "ready", "exit STATUS".
share() {
    mkdir -p "$2"
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,cache=loose,$3" "$1" "$2" ||
        echo "no-files $1" >&3
}
# Writable, and forgotten at the end.
share machine /lower ro
mkdir /upper
mount -t tmpfs tmpfs /upper
mkdir /upper/files /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work machine /machine ||
    echo "no-files overlay" >&3
for folder in tmp run var/tmp; do
    mount -t tmpfs -o mode=1777 tmpfs /machine/$folder
done
workspace=/machine$(cat /job/workspace)
# One of those folders may have hidden it.
[ -e "$workspace" ] || share workspace "$workspace" ro
share target "$workspace/target" rw
for folder in proc sys dev; do
    mount --rbind /$folder /machine/$folder
done
mkdir /machine/run/job
cp /job/* /machine/run/job/

# Pipes instead of the ports themselves: a program may open /dev/stdout again.
mkfifo /out /err
cat /out >/dev/vport0p1 &
out=$!
cat /err >/dev/vport0p2 &
err=$!
echo ready >&3
chroot /machine /bin/sh /run/job/command </dev/null >/out 2>/err 3>&-
status=$?
# What the command leaves in the background may hold the pipes open.
i=0
while { kill -0 $out || kill -0 $err; } 2>/dev/null && [ $i -lt 100 ]; do
    i=$((i + 1))
    usleep 20000
done
echo "exit $status" >&3
sync
exec poweroff -f
