-- Users' own upstream keys (BYOK). Requests under them are metered and limited, not charged.

create table public.provider_keys (
    user_id bigint primary key references public.users (id),
    encrypted_key text not null check (length(encrypted_key) <= 2000),
    label text not null check (length(label) between 1 and 64),
    is_active boolean not null default true,
    created_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp()
);
comment on table public.provider_keys is 'Encrypted at rest; `label` is what may be shown of it.';
alter table public.provider_keys enable row level security;
revoke all on public.provider_keys from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.provider_keys to service_role;

-- Keeps the flags in public.users, so that admission need not look into these tables. Whoever writes them
-- locks the user first: this trigger alone would lock the user after the row, and two writers could meet in
-- opposite orders.
create function public.note_spend_settings() returns trigger language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := coalesce(new.user_id, old.user_id);
begin
    -- Locked by a statement of its own, so that the next one sees what other transactions left.
    perform from public.users where id = v_user_id for no key update;
    update public.users u set has_provider_key = f.provider_key, has_end_user_budgets = f.budgets
    from (select exists (select from public.provider_keys p
                         where p.user_id = v_user_id and p.is_active) as provider_key,
                 exists (select from public.end_user_budgets b where b.user_id = v_user_id) as budgets) as f
    where u.id = v_user_id
      and (u.has_provider_key, u.has_end_user_budgets) is distinct from (f.provider_key, f.budgets);
    return null;
end $$;
revoke all on function public.note_spend_settings() from public, anon, authenticated;
grant execute on function public.note_spend_settings() to service_role;

create trigger provider_keys_noted after insert or delete or update of is_active on public.provider_keys
    for each row execute function public.note_spend_settings();

-- p: encrypted_key, label. Outcomes: set, not_found.
create function public.set_provider_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_key public.provider_keys;
begin
    if v_user_id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    insert into public.provider_keys as k (user_id, encrypted_key, label)
    values (v_user_id, p ->> 'encrypted_key', p ->> 'label')
    on conflict (user_id) do update set
        encrypted_key = excluded.encrypted_key, label = excluded.label, is_active = true,
        updated_at = clock_timestamp()
    returning * into v_key;
    perform public.audit_order(
        p, 'set_provider_key', 'user:' || v_user_id, v_user_id, jsonb_build_object('label', v_key.label));
    return jsonb_build_object(
        'outcome', 'set', 'label', v_key.label, 'is_active', v_key.is_active, 'created_at', v_key.created_at,
        'updated_at', v_key.updated_at);
end $$;
revoke all on function public.set_provider_key(jsonb) from public, anon, authenticated;
grant execute on function public.set_provider_key(jsonb) to service_role;

-- Outcomes: deleted, not_found.
create function public.delete_provider_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_label text;
begin
    delete from public.provider_keys where user_id = v_user_id returning label into v_label;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    perform public.audit_order(
        p, 'delete_provider_key', 'user:' || v_user_id, v_user_id, jsonb_build_object('label', v_label));
    return jsonb_build_object('outcome', 'deleted');
end $$;
revoke all on function public.delete_provider_key(jsonb) from public, anon, authenticated;
grant execute on function public.delete_provider_key(jsonb) to service_role;
